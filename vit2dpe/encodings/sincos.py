"""`sincos`: sines and cosines of the coordinates, added to tokens.

    token(p) = sin(p_a ω_k), cos(p_a ω_k) for each axis a and k < K, in the order of a layout;   ω_k = base^(-k/K)

Checkpoints depend on the order of the channels, so the orders have names. On two axes (y row, x column), K = D/4:

    "mae"         [sin x | cos x | sin y | cos y]               MAE, arXiv 2111.06377, `util/pos_embed.py`; Lightly
    "big_vision"  the same, but ω_k = base^(-k/(K - 1))         big_vision, `models/vit.py` (`posemb_sincos_2d`)
    "timm"        [sin y | sin x | cos y | cos x]               timm, `build_sincos2d_pos_embed`
    "wzlxjtu"     [sin x₀ cos x₀ sin x₁ ... | sin y₀ cos y₀ ...]     wzlxjtu/PositionalEncoding2D
    "tatp22"      [sin y₀ cos y₀ sin y₁ ... | sin x₀ cos x₀ ...]     tatp22/multidim-positional-encoding

With three axes "mae" and its kin go on from the last axis to the first, the others from the first to the last. On one
axis "wzlxjtu" is the formula of the text paper, Vaswani et al., arXiv 1706.03762: sin at even, cos at odd channels.

How ours differs: any number of axes, any places (fractional, per sample), computed from the coordinates at each call
in float64. Only "tatp22" takes a width that does not divide: it rounds K up and drops the last channels, as the
original does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, unknown
from ..positions import Positions, exact
from .base import PositionEncoding

LAYOUTS = ("mae", "big_vision", "timm", "wzlxjtu", "tatp22")


class SinCos(PositionEncoding):
    """Fixed sinusoids; nothing learned, nothing stored.

    Args:
        dim: width D, a multiple of 2 * axes (any with layout "tatp22").
        axes: d, how many coordinates a place has.
        base: ratio of the longest to the shortest wavelength; 10,000 in all sources.
        layout: channel order, a name of the table above. Default: "mae", and on one axis "wzlxjtu".
    """

    gives = frozenset({"token"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, dim: int, *, axes: int = 2, base: float = 10_000.0, layout: str | None = None) -> None:
        super().__init__()
        layout = layout or ("wzlxjtu" if axes == 1 else "mae")
        if layout not in LAYOUTS:
            raise unknown("layout of sincos", layout, LAYOUTS)
        if dim % (2 * axes) and layout != "tatp22":
            raise ConfigError(f"sincos needs a width that is a multiple of 2 x axes: got dim={dim}, axes={axes}")
        if layout == "big_vision" and dim // (2 * axes) < 2:
            raise ConfigError(f"layout big_vision needs two frequencies an axis: got dim={dim}, axes={axes}")
        if not base > 1:
            raise ConfigError(f"sincos needs base > 1, got {base}")
        self.dim, self.axes, self.base, self.layout = dim, axes, base, layout

    def token(self, at: Positions) -> Tensor:
        if at.axes != self.axes:
            raise ValueError(f"this sincos was built for {self.axes} axes, the positions have {at.axes}")
        coords = exact(at.coords)
        count = -(-self.dim // (2 * self.axes))  # K, rounded up
        k = torch.arange(count, dtype=torch.float64, device=coords.device)
        omega = self.base ** (-k / (count - 1 if self.layout == "big_vision" else count))
        waves = [coords[..., axis, None] * omega for axis in range(self.axes)]  # each (B|1, N, K)
        if self.layout == "timm":
            return torch.cat([angle.sin() for angle in waves] + [angle.cos() for angle in waves], dim=-1)
        if self.layout != "tatp22":
            waves.reverse()
        if self.layout in ("mae", "big_vision"):
            return torch.cat([wave for angle in waves for wave in (angle.sin(), angle.cos())], dim=-1)
        pairs = [torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2) for angle in waves]
        return torch.cat(pairs, dim=-1)[..., : self.dim]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, axes={self.axes}, base={self.base:g}, layout={self.layout!r}"
