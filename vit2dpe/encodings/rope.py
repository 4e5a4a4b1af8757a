"""The rotary encodings: turn queries and keys by angles that are linear in the coordinates.

    angle_i(p) = ⟨w_i, p⟩   for pair i of Dh/2,   so that ⟨R(q) x, R(k) y⟩ depends on q - k alone

A rotary encoding is its frequency vectors w, (d, 1|H, Dh/2) radians per patch:

    rope         one axis each: pairs [a K, (a + 1) K) turn with coordinate a at base^(-k/K), K = Dh / (2 d)
    rope_mixed   learned, per head and block; drawn as `rope` with base 10 along axes turned at random per head
    rope_golden  fixed, each pair of each head along a direction of its own     (rope_golden.py)
    rope_dinov3  one axis each, on coordinates centred and scaled to the grid   (rope_dinov3.py)

Sources: RoFormer, arXiv 2104.09864; RoPE for ViT, arXiv 2403.13298, `models/vit_rope.py`; timm, `pos_embed_sincos.py`.

How ours differs: any number of axes, rows before columns (rope-vit has columns first), any places, float64 angles for
the fixed ones. Pairs are (2i, 2i+1), as in rope-vit and timm; half-split checkpoints are permuted on loading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions, exact
from ..signal import LinearAngles
from .base import PositionEncoding


class DirectionalRoPE(PositionEncoding):
    """The common core: angle_i(p) = Σ_a w[a, i] p_a for the frequencies a subclass names."""

    relative = True
    gives = frozenset({"rotation"})
    policies: tuple[str, ...] = ("extrapolate", "interpolate", "ntk", "yarn")

    def frequencies(self, device: torch.device) -> Tensor:
        """(d, 1|H, Dh/2) radians per patch."""
        raise TypeError(f"{type(self).__name__} must name its frequencies")

    def angle(self, at: Positions) -> LinearAngles:
        w = self.frequencies(at.coords.device)
        if at.axes != w.shape[0]:
            raise ValueError(f"the frequencies have {w.shape[0]} axes, the positions {at.axes}")
        if self.policy is not None:
            w = self.policy.rescale(w, at.extent)
        coords = exact(at.coords) if w.dtype == torch.float64 else at.coords
        return LinearAngles(coords.to(w.device, w.dtype), w)


class AxialRoPE(DirectionalRoPE):
    """Fixed frequencies, each along one axis; nothing learned, nothing stored.

    Args:
        head_dim: Dh, a multiple of 2 * axes.
        axes: d.
        base: ratio of the longest to the shortest wavelength; default 100 for images, 10,000 for text (d = 1).
        step: radians that the fastest pair turns from one patch to the next, one number or one of each axis. EVA-02's
            weights of a 32x32 grid, trained further from a 16x16 one, have 1/2.
        start: the coordinate of the first patch. Between patches it changes nothing; a prefix token stands at 0, and
            Meta's Perception Encoder counts from 1.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        axes: int = 2,
        base: float | None = None,
        step: float | tuple[float, ...] = 1.0,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        base = (10_000.0 if axes == 1 else 100.0) if base is None else base
        check_widths(head_dim, axes, base)
        steps = step if isinstance(step, tuple) else (step,) * axes
        if len(steps) != axes or not all(s > 0 for s in steps):
            raise ConfigError(f"rope needs step > 0, one number or {axes}, one of each axis; got {step}")
        self.head_dim, self.axes, self.base, self.steps, self.start = head_dim, axes, base, steps, start

    def frequencies(self, device: torch.device) -> Tensor:
        bank = magnitudes(self.head_dim // (2 * self.axes), self.base, device)
        return torch.block_diag(*[bank if step == 1 else bank * step for step in self.steps])[:, None]  # (d, 1, Dh/2)

    def angle(self, at: Positions) -> LinearAngles:
        return super().angle(at if self.start == 0 else Positions(at.coords + self.start, at.extent))

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, axes={self.axes}, base={self.base:g}, step={self.steps}, start={self.start:g}"
        )


class MixedRoPE(DirectionalRoPE):
    """Learned frequencies, one set for each head and block.

    Args:
        head_dim: Dh, a multiple of 2 * axes.
        heads: H.
        axes: d.
        base: of the magnitudes it starts from.
    """

    per_block = True

    def __init__(self, head_dim: int, heads: int, *, axes: int = 2, base: float = 10.0) -> None:
        super().__init__()
        check_widths(head_dim, axes, base)
        self.base = base
        self.freqs = nn.Parameter(torch.empty(axes, heads, head_dim // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        axes, heads, pairs = self.freqs.shape
        bank = magnitudes(pairs // axes, self.base, self.freqs.device)
        turned = torch.stack([_random_axes(axes, self.freqs.device) for _ in range(heads)])  # (H, d, d)
        # Pair (j, k) of head h turns along the j-th turned axis with magnitude k.
        self.freqs.copy_((turned[..., None] * bank).permute(2, 0, 1, 3).flatten(2))

    def frequencies(self, device: torch.device) -> Tensor:
        return self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))

    def extra_repr(self) -> str:
        axes, heads, pairs = self.freqs.shape
        return f"head_dim={2 * pairs}, heads={heads}, axes={axes}, base={self.base:g}"


def magnitudes(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-k/K) for k < K, float64: one radian per patch first, 1/base never quite reached."""
    k = torch.arange(count, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    return base ** (k / -count)


def _random_axes(axes: int, device: torch.device) -> Tensor:
    """(d, d) orthonormal rows, uniformly turned; the mirror images among them give the same kernel."""
    if axes == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    if axes == 2:
        phi = torch.rand((), dtype=torch.float64, device=device) * (2 * math.pi)
        return torch.stack([phi.sin(), phi.cos(), phi.cos(), -phi.sin()]).view(2, 2)
    q, r = torch.linalg.qr(torch.randn(axes, axes, dtype=torch.float64, device=device))
    return q * r.diagonal().sign()


def check_widths(head_dim: int, axes: int, base: float) -> None:
    if head_dim % (2 * axes):
        raise ConfigError(
            f"a rotary encoding of {axes} axes needs a head width that is a multiple of {2 * axes}: got {head_dim}"
        )
    if not base > 1:
        raise ConfigError(f"a rotary encoding needs base > 1, got {base}")
