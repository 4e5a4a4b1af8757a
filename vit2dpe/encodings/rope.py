"""The rotary encodings: turn queries and keys by angles that are linear in the coordinates.

    angle_i(p) = ⟨w_i, p⟩   for pair i of Dh/2,   so that ⟨R(q) x, R(k) y⟩ depends on q - k alone

A rotary encoding is its frequency vectors w, (d, 1|H, Dh/2) radians per patch:

    rope         one axis each: pairs [a K, (a + 1) K) turn with coordinate a at base^(-k/K), K = Dh / (2 d)
    rope_mixed   learned, per head and block; drawn as `rope` with base 10 along axes turned at random per head
    rope_golden  fixed, each pair of each head along a direction of its own, quasi-uniform over all of them
    rope_dinov3  one axis each, on coordinates centred and scaled to the grid; moved at random in training

Sources: RoFormer, arXiv 2104.09864; RoPE for ViT, arXiv 2403.13298, `models/vit_rope.py`; timm, `pos_embed_sincos.py`;
N-dimensional rotary embeddings, jerryxio.ng/posts/nd-rope (2025); DINOv3, arXiv 2508.10104,
`layers/rope_position_encoding.py`.

How ours differs: any number of axes, rows before columns (rope-vit has columns first), any places, float64 angles for
the fixed ones. Pairs are (2i, 2i+1), as in rope-vit and timm; half-split checkpoints are permuted on loading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions, exact
from .base import PositionEncoding


class DirectionalRoPE(PositionEncoding):
    """The common core: angle_i(p) = Σ_a w[a, i] p_a for the frequencies a subclass names."""

    relative = True
    gives = frozenset({"rotation"})
    policies: tuple[str, ...] = ("extrapolate", "interpolate", "ntk", "yarn")

    def frequencies(self, device: torch.device) -> Tensor:
        """(d, 1|H, Dh/2) radians per patch."""
        raise TypeError(f"{type(self).__name__} must name its frequencies")

    def angle(self, at: Positions) -> Tensor:
        w = self.frequencies(at.coords.device)
        if at.axes != w.shape[0]:
            raise ValueError(f"the frequencies have {w.shape[0]} axes, the positions {at.axes}")
        if self.policy is not None:
            w = self.policy.rescale(w, at.extent)
        coords = exact(at.coords).to(w.device, w.dtype)[:, None, :, :, None]  # (B|1, 1, N, d, 1)
        angle = coords[..., 0, :] * w[0][:, None]  # (B|1, 1|H, N, Dh/2); a matmul could be autocast
        for axis in range(1, at.axes):
            angle = angle + coords[..., axis, :] * w[axis][:, None]
        return angle


class AxialRoPE(DirectionalRoPE):
    """Fixed frequencies, each along one axis; nothing learned, nothing stored.

    Args:
        head_dim: Dh, a multiple of 2 * axes.
        axes: d.
        base: ratio of the longest to the shortest wavelength; default 100 for images, 10,000 for text (d = 1).
    """

    def __init__(self, head_dim: int, *, axes: int = 2, base: float | None = None) -> None:
        super().__init__()
        base = (10_000.0 if axes == 1 else 100.0) if base is None else base
        _check(head_dim, axes, base)
        self.head_dim, self.axes, self.base = head_dim, axes, base

    def frequencies(self, device: torch.device) -> Tensor:
        bank = magnitudes(self.head_dim // (2 * self.axes), self.base, device)
        return torch.block_diag(*[bank] * self.axes)[:, None]  # (d, 1, Dh/2)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, axes={self.axes}, base={self.base:g}"


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
        _check(head_dim, axes, base)
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


class GoldenRoPE(DirectionalRoPE):
    """Fixed frequencies along quasi-uniform directions: no two pairs look the same way.

        w_i = ω_f u_i · 2 / (g - 1),    ω log-spaced from `low` to `high`, g the geometric mean side of the grid

    In two dimensions pair f of head h looks at angle (h F + f) π / φ, φ the golden ratio; any few neighbours are spread
    evenly over half a turn. In more, directions are Gaussian quantiles of a golden (R_d) sequence, normalised.

    Args:
        head_dim: Dh, even.
        heads: H.
        grid: the training grid, on whose half-diagonal scale `low` and `high` are measured.
        low, high: radians from the middle to the edge of the grid, for the slowest and the fastest pair.
    """

    def __init__(
        self, head_dim: int, heads: int, grid: Sequence[int], *, low: float = 1.0, high: float = 100.0
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ConfigError(f"rope_golden needs an even head width, got {head_dim}")
        if not 0 < low <= high:
            raise ConfigError(f"rope_golden needs 0 < low <= high, got low={low} and high={high}")
        self.head_dim, self.heads, self.grid, self.low, self.high = head_dim, heads, tuple(grid), low, high

    def frequencies(self, device: torch.device) -> Tensor:
        pairs, axes = self.head_dim // 2, len(self.grid)
        side = max(2.0, math.prod(self.grid) ** (1 / axes))
        step = torch.arange(pairs, dtype=torch.float64) / max(1, pairs - 1)
        omega = self.low * (self.high / self.low) ** step * 2 / (side - 1)
        directions = golden_directions(self.heads * pairs, axes).view(axes, self.heads, pairs)
        return (directions * omega).to(device if device.type != "mps" else "cpu")

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}, grid={self.grid}, low={self.low:g}, high={self.high:g}"


class CentredRoPE(DirectionalRoPE):
    """DINOv3's: angle = 2π c / period on coordinates c in (-1, 1), so a grid of any size spans the same angles.

        c_a = 2 (p_a + 1/2) / S_a - 1,    period_k = base^(k/K),    K = Dh / (2 d)

    In training places are moved at random, once a forward: c is multiplied by a factor shared by all axes and one of
    each axis, log-uniform in [1/rescale, rescale] and [1/jitter, jitter], after a shift of each axis, uniform in
    ±shift.

    Args:
        head_dim: Dh, a multiple of 2 * axes.
        axes: d.
        base: ratio of the longest to the shortest period.
        rescale, jitter: at least 1; 1 is off. DINOv3's released models were trained with rescale 2 alone.
        shift: in units of c; 0 is off.
    """

    policies = ("interpolate",)  # what it does by itself: its coordinates are scaled to the grid

    def __init__(
        self,
        head_dim: int,
        *,
        axes: int = 2,
        base: float = 100.0,
        rescale: float = 2.0,
        jitter: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        _check(head_dim, axes, base)
        if rescale < 1 or jitter < 1 or shift < 0:
            raise ConfigError(
                f"rope_dinov3 needs rescale >= 1, jitter >= 1 and shift >= 0, got {rescale}, {jitter} and {shift}"
            )
        self.head_dim, self.axes, self.base = head_dim, axes, base
        self.rescale, self.jitter, self.shift = rescale, jitter, shift

    def frequencies(self, device: torch.device) -> Tensor:
        bank = 2 * math.pi * magnitudes(self.head_dim // (2 * self.axes), self.base, device)
        return torch.block_diag(*[bank] * self.axes)[:, None]  # (d, 1, Dh/2) radians per unit of c

    def angle(self, at: Positions) -> Tensor:
        if at.axes != self.axes:
            raise ValueError(f"this rope was built for {self.axes} axes, the positions have {at.axes}")
        return super().angle(Positions(_centred(at), at.extent))

    def perturb(self, at: Positions) -> Callable[[Positions], Positions] | None:
        if self.rescale == 1 and self.jitter == 1 and self.shift == 0:
            return None
        draw = torch.rand(2 * self.axes + 1, dtype=torch.float64) * 2 - 1  # (-1, 1)
        shift = self.shift * draw[: self.axes]
        factor = self.jitter ** draw[self.axes : -1] * self.rescale ** draw[-1]

        def moved(where: Positions) -> Positions:
            half = torch.tensor(where.extent, dtype=torch.float64) / 2
            scale, offset = (
                t.to(where.coords.device, where.coords.dtype) for t in (factor, (factor * shift + 1) * half)
            )
            middle = half.to(where.coords.device, where.coords.dtype)
            # c' = factor (c + shift), written in patches: p + 1/2 = (c + 1) S / 2
            return Positions((where.coords + 0.5 - middle) * scale + offset - 0.5, where.extent, where.prefix)

        return moved

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, axes={self.axes}, base={self.base:g}, rescale={self.rescale:g}, "
            f"jitter={self.jitter:g}, shift={self.shift:g}"
        )


def _centred(at: Positions) -> Tensor:
    coords = exact(at.coords)
    extent = torch.tensor(at.extent, dtype=coords.dtype, device=coords.device)
    return 2 * (coords + 0.5) / extent - 1


def golden_directions(count: int, axes: int) -> Tensor:
    """(d, count) unit vectors, any few neighbours spread evenly; float64. On a line all are 1."""
    if axes == 1:
        return torch.ones(1, count, dtype=torch.float64)
    n = torch.arange(count, dtype=torch.float64)
    if axes == 2:
        angle = n * (math.pi / ((1 + 5**0.5) / 2))
        return torch.stack([angle.sin(), angle.cos()])
    golden = 2.0
    for _ in range(60):  # the fixed point of x = (1 + x)^(1 / (d + 1))
        golden = (1 + golden) ** (1 / (axes + 1))
    steps = torch.tensor([golden ** -(axis + 1) for axis in range(axes)], dtype=torch.float64)
    quantile = (0.5 + (n + 1) * steps[:, None]).remainder(1.0)  # (d, count) in (0, 1)
    gauss = torch.erfinv((2 * quantile - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    return gauss / gauss.norm(dim=0, keepdim=True)


def magnitudes(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-k/K) for k < K, float64: one radian per patch first, 1/base never quite reached."""
    k = torch.arange(count, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    return base ** (-k / count)


def _random_axes(axes: int, device: torch.device) -> Tensor:
    """(d, d) orthonormal rows, uniformly turned; the mirror images among them give the same kernel."""
    if axes == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    if axes == 2:
        phi = torch.rand((), dtype=torch.float64, device=device) * (2 * math.pi)
        return torch.stack([phi.sin(), phi.cos(), phi.cos(), -phi.sin()]).view(2, 2)
    q, r = torch.linalg.qr(torch.randn(axes, axes, dtype=torch.float64, device=device))
    return q * r.diagonal().sign()


def _check(head_dim: int, axes: int, base: float) -> None:
    if head_dim % (2 * axes):
        raise ConfigError(
            f"a rotary encoding of {axes} axes needs a head width that is a multiple of {2 * axes}: got {head_dim}"
        )
    if not base > 1:
        raise ConfigError(f"a rotary encoding needs base > 1, got {base}")
