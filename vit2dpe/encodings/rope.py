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
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..errors import ConfigError
from ..positions import Positions, float64_device, is_tracing
from ..signal import Rotation
from .base import Policy, PositionEncoding, can_interleave


class LinearAngles(NamedTuple):
    """Angles that are linear in the places, angle_i(p) = Σ_a w[a, i] p_a; `.dense()` is the reference.

    Args:
        coords: (B|1, N, d).
        w: (d, 1|H, Dh/2) radians per patch, in the dtype of `coords`.
    """

    coords: Tensor
    w: Tensor

    def resolve(self, policy: Policy | None, span: tuple[float, ...], prefix: int) -> Tensor | Rotation:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        w = self.w if policy is None else policy.rescale(self.w, span)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords  # nothing turns at 0
        learned = w.requires_grad and torch.is_grad_enabled() and not coords.requires_grad
        if learned and can_interleave(w):
            return Rotation(*_CosSin.apply(coords, w))
        return LinearAngles(coords, w).dense()

    def dense(self) -> Tensor:
        """(B|1, 1|H, N, Dh/2)"""
        places = self.coords[:, None, :, :, None].unbind(-2)  # of each axis (B|1, 1, N, 1)
        w = self.w[:, :, None].unbind(0)  # of each axis (1|H, 1, Dh/2)
        angle = places[0] * w[0]  # a matmul could be autocast, or rounded to TF32
        for place, frequency in zip(places[1:], w[1:], strict=True):
            angle.add_(place * frequency)  # not addcmul, whose one rounding would tell the axes apart
        return angle


class AxialAngles(NamedTuple):
    """Angles of pairs that each turn along one axis, angle_(a, k)(p) = w[a, k] p_a: one product, and no zeros added.

    Args:
        coords: (B|1, N, d), of any precision.
        w: (d, K) radians per patch, K = Dh / (2 d).
    """

    coords: Tensor
    w: Tensor

    def resolve(self, policy: Policy | None, span: tuple[float, ...], prefix: int) -> Tensor | Rotation:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        if policy is not None:  # which reads, and may mix, the frequencies of all axes
            return LinearAngles(self.coords.to(self.w.dtype), along_axes(self.w)).resolve(policy, span, prefix)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords
        return AxialAngles(coords, self.w).dense()

    def dense(self) -> Tensor:
        """(B|1, 1, N, Dh/2)"""
        return (self.coords[:, None, :, :, None] * self.w).flatten(-2)


class _CosSin(torch.autograd.Function):
    """Cosine and sine of learned linear angles, interleaved.

    The backward takes the gradients of both at once, computes neither again, and sums over tokens in one product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(coords: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        angle = LinearAngles(coords, w).dense()
        cos, sin = torch.view_as_real(torch.complex(angle.cos(), angle.sin_())).unbind(-1)
        return cos, sin

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: _Saved, dcos: Tensor, dsin: Tensor) -> tuple[None, Tensor]:
        coords, cos, sin = ctx.saved_tensors
        dangle = torch.addcmul(dsin * cos, dcos, sin, value=-1)  # (B|1, 1|H, N, Dh/2)
        with torch.autocast(dangle.device.type, enabled=False):  # as precise as any product of this device
            dw = coords.mT.unsqueeze(1) @ dangle  # (B|1, 1|H, d, Dh/2)
        return None, (dw.sum(0) if len(dw) > 1 else dw[0]).transpose(0, 1)

    @staticmethod
    def jvp(ctx: _Saved, coords_t: Tensor | None, w_t: Tensor | None) -> tuple[Tensor, Tensor]:
        coords, w, cos, sin = ctx.saved_tensors
        along = torch.zeros_like(cos)  # the change of the angle
        if w_t is not None:
            along = along + LinearAngles(coords, w_t).dense()
        if coords_t is not None:
            along = along + LinearAngles(coords_t, w).dense()
        return -sin * along, cos * along


class _Saved(Protocol):
    saved_tensors: tuple[Tensor, ...]


class DirectionalRoPE(PositionEncoding):
    """The common core: angle_i(p) = Σ_a w[a, i] p_a for the frequencies a subclass names."""

    relative = True
    gives = frozenset({"rotation"})
    policies: tuple[str, ...] = ("extrapolate", "interpolate", "ntk", "yarn")

    def frequencies(self, device: torch.device) -> Tensor:
        """(d, 1|H, Dh/2) radians per patch."""
        raise TypeError(f"{type(self).__name__} must name its frequencies")

    def angle(self, at: Positions) -> LinearAngles | AxialAngles:
        w = self.frequencies(at.coords.device)
        _check_axes(at, w)
        # The device first: where it has no float64, formulas have their frequencies on the CPU.
        return LinearAngles(at.coords.to(w.device).to(w.dtype), w)


class AlongAxes(DirectionalRoPE):
    """Fixed frequencies, each along one axis: pairs [a K, (a + 1) K) turn with coordinate a."""

    def banks(self, device: torch.device) -> Tensor:
        """(d, K) radians per patch."""
        raise TypeError(f"{type(self).__name__} must name its frequencies")

    def frequencies(self, device: torch.device) -> Tensor:
        return along_axes(self.banks(device))

    def angle(self, at: Positions) -> AxialAngles:
        w = self.banks(at.coords.device)
        _check_axes(at, w)
        return AxialAngles(at.coords.to(w.device), w)


class AxialRoPE(AlongAxes):
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

    def banks(self, device: torch.device) -> Tensor:
        bank = magnitudes(self.head_dim // (2 * self.axes), self.base, device)
        if all(step == 1 for step in self.steps):
            return bank.expand(self.axes, -1)
        return torch.stack([bank * step for step in self.steps])

    def angle(self, at: Positions) -> AxialAngles:
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
        device = float64_device(self.freqs.device)
        bank = magnitudes(pairs // axes, self.base, device)
        turned = torch.stack([_random_axes(axes, device) for _ in range(heads)])  # (H, d, d)
        # Pair (j, k) of head h turns along the j-th turned axis with magnitude k.
        self.freqs.copy_((turned[..., None] * bank).permute(2, 0, 1, 3).flatten(2))

    def frequencies(self, device: torch.device) -> Tensor:
        return self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))

    def extra_repr(self) -> str:
        axes, heads, pairs = self.freqs.shape
        return f"head_dim={2 * pairs}, heads={heads}, axes={axes}, base={self.base:g}"


def _check_axes(at: Positions, w: Tensor) -> None:
    if len(at.extent) != w.shape[0]:
        raise ValueError(f"the frequencies have {w.shape[0]} axes, the positions {at.axes}")


def along_axes(banks: Tensor) -> Tensor:
    """(d, 1, d K) of d banks (d, K), each along an axis of its own: a block-diagonal matrix.

    A graph pads and adds: converters of traced ones lack `block_diag`, of which a compiler makes six kernels. Elsewhere
    that is one.
    """
    if not is_tracing() and not torch.compiler.is_compiling():
        w: Tensor = torch.block_diag(*banks.unbind(0))
        return w[:, None]
    count, last = len(banks[0]), len(banks) - 1
    rows = [
        F.pad(bank[None], (i * count, (last - i) * count, i, last - i)) for i, bank in enumerate(banks.unbind(0))
    ]  # each (d, d K)
    return sum(rows[1:], rows[0])[:, None]


def magnitudes(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-k/K) for k < K, float64: one radian per patch first, 1/base never quite reached."""
    k = torch.arange(count, dtype=torch.float64, device=float64_device(device))
    return base ** (k / -count)


def _random_axes(axes: int, device: torch.device) -> Tensor:
    """(d, d) orthonormal rows, uniformly turned; the mirror images among them give the same kernel."""
    if axes == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    if axes == 2:
        phi = torch.rand((), dtype=torch.float64, device=device) * (2 * math.pi)
        return torch.stack([phi.sin(), phi.cos(), phi.cos(), -phi.sin()]).view(2, 2)
    q, r = torch.linalg.qr(torch.randn(axes, axes, dtype=torch.float64, device=device))
    rows: Tensor = q * r.diagonal().sign()
    return rows


def check_widths(head_dim: int, axes: int, base: float) -> None:
    if head_dim % (2 * axes):
        raise ConfigError(
            f"a rotary encoding of {axes} axes needs a head width that is a multiple of {2 * axes}: got {head_dim}"
        )
    if not base > 1:
        raise ConfigError(f"a rotary encoding needs base > 1, got {base}")
