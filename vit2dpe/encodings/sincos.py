"""`sincos`: sines and cosines of the coordinates, added to tokens.

    ω_k = base^(-k/K),   K = D / (2 d),   k < K
    each axis fills D/d channels:  [sin(p ω_0..K-1) | cos(p ω_0..K-1)]

Sources: Vaswani et al., arXiv 1706.03762 (one axis); MAE, arXiv 2111.06377, `util/pos_embed.py` (two axes);
timm, `build_sincos2d_pos_embed`.

How ours differs: any number of axes, any places (fractional, per sample), computed from the coordinates at each
call, and channel orders that checkpoints depend on have names:

    "mae"   last axis first:    [sin x | cos x | sin y | cos y]
    "timm"  all sines first:    [sin y | sin x | cos y | cos x]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, unknown
from ..positions import Positions, exact
from .base import PositionEncoding

LAYOUTS = ("mae", "timm")


class SinCos(PositionEncoding):
    """Fixed sinusoids; nothing learned, nothing stored.

    Args:
        dim: width D, a multiple of 2 * axes.
        axes: d, how many coordinates a place has.
        base: ratio of the longest to the shortest wavelength; 10,000 in all sources.
        layout: channel order, "mae" or "timm". With one axis they are the same.
    """

    gives = frozenset({"token"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, dim: int, *, axes: int = 2, base: float = 10_000.0, layout: str = "mae") -> None:
        super().__init__()
        if dim % (2 * axes):
            raise ConfigError(f"sincos needs a width that is a multiple of 2 x axes: got dim={dim}, axes={axes}")
        if not base > 1:
            raise ConfigError(f"sincos needs base > 1, got {base}")
        if layout not in LAYOUTS:
            raise unknown("layout of sincos", layout, LAYOUTS)
        self.dim, self.axes, self.base, self.layout = dim, axes, base, layout

    def token(self, at: Positions) -> Tensor:
        if at.axes != self.axes:
            raise ValueError(f"this sincos was built for {self.axes} axes, the positions have {at.axes}")
        coords = exact(at.coords)
        k = torch.arange(self.dim // (2 * self.axes), dtype=torch.float64, device=coords.device)
        omega = self.base ** (-k / len(k))
        waves = [coords[..., axis, None] * omega for axis in range(self.axes)]  # each (B|1, N, K)
        if self.layout == "mae":
            parts = [wave for angle in reversed(waves) for wave in (angle.sin(), angle.cos())]
        else:
            parts = [angle.sin() for angle in waves] + [angle.cos() for angle in waves]
        return torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, axes={self.axes}, base={self.base:g}, layout={self.layout!r}"
