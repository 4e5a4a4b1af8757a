"""The rotary encodings: turn queries and keys by angles that are linear in the coordinates.

    angle_i(p) = ⟨w_i, p⟩   for pair i of Dh/2,   so that ⟨R(q) x, R(k) y⟩ depends on q - k alone

A rotary encoding is its frequency vectors w, (d, 1|H, Dh/2) radians per patch:

    rope         one axis each: pairs [a K, (a + 1) K) turn with coordinate a at base^(-k/K), K = ⌊Dh/2d⌋
    rope_mixed   learned, per head and block; drawn as `rope` with base 10 along axes turned at random per head
    rope_golden  fixed, each pair of each head along a direction of its own     (rope_golden.py)
    rope_dinov3  one axis each, on coordinates centred and scaled to the grid   (rope_dinov3.py)

Any even head width serves any number of axes; pairs left over stand still, w = 0, behind the others. Options of `rope`,
`rope_mixed` and `rope_dinov3` say which pairs turn with which axis, and how fast (sections.py; DINOv3's has no start):

    sections=(8, 28, 28)       pairs of each axis, time before rows before columns (Flux, Wan, Qwen2-VL, V-JEPA 2)
    partial=0.5                the share of the pairs that turns (`partial_rotary_factor`; Qwen3.5)
    zeros=K                    the last K pairs of each bank have frequency 0, the others are as they were (Gemma)
    order=interleaved, head    every d-th pair an axis's (Qwen3-VL); whole heads, `sections` of heads (MHRoPE)
    bank=whole                 base^(-i/n) for pair i of the n that turn, whatever its axis (Qwen2-VL, Qwen3-VL)
    base, step, start          one number, or one of each axis: base=(10000, 100, 100)

An exponent over another count K' is a base: base^(K/K') ^ (-k/K) = base^(-k/K'); modded-nanogpt has K' = K - 1.

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

from ..positions import Positions, float64_device, numbers
from ..signal import Rotation
from .angles import AxialAngles, SectionAngles
from .base import Policy, PositionEncoding, can_interleave
from .sections import Sections, of_each


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

    def angle(self, at: Positions) -> LinearAngles | AxialAngles | SectionAngles:
        w = self.frequencies(at.coords.device)
        _check_axes(at, len(w))
        # The device first: where it has no float64, formulas have their frequencies on the CPU.
        return LinearAngles(at.coords.to(w.device).to(w.dtype), w)


class AlongAxes(DirectionalRoPE):
    """Fixed frequencies, each along one axis."""

    sections: Sections

    def frequencies(self, device: torch.device) -> Tensor:
        return self.sections.frequencies(device)

    def angle(self, at: Positions) -> AxialAngles | SectionAngles:
        _check_axes(at, self.sections.axes)
        return self.sections.angles(at.coords)


class AxialRoPE(AlongAxes):
    """Fixed frequencies, each along one axis; nothing learned, nothing stored.

    Args:
        head_dim: Dh, even.
        axes: d.
        heads: H, for `order="head"`.
        base: ratio of the longest to the shortest wavelength, one number or one of each axis; default 100 for images,
            10,000 for text (d = 1).
        step: radians that the fastest pair turns from one patch to the next, one number or one of each axis. EVA-02's
            weights of a 32x32 grid, trained further from a 16x16 one, have 1/2.
        start: the coordinate of the first patch, one number or one of each axis. Between patches it changes nothing; a
            prefix token stands at 0, and Meta's Perception Encoder counts from 1.
        sections: pairs of channels of each axis, time before rows before columns; what is left over stands still,
            behind the others. Default: floor(n / d) each, n the pairs that turn.
        partial: the share of the pairs that turns, n = partial Dh / 2; the banks are those of a head so much narrower
            (`partial_rotary_factor` of transformers).
        zeros: the last pairs of each bank, which have frequency 0, while the others stay what they are (transformers'
            `proportional`, Gemma).
        order: "axis", pairs of an axis behind each other; "interleaved", every d-th pair an axis's, as in Qwen3-VL and
            timm's `RotaryEmbeddingMRope`; "head", whole heads for an axis with all pairs (MHRoPE), where `sections`
            are heads.
        bank: "own", base^(-k/K) for the k-th of an axis's K pairs; "whole", base^(-i/n) for pair i of n, whichever axis
            it turns with, as in Qwen2-VL and Qwen3-VL.
        llama3: (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings), by which Llama 3.1's
            frequencies are slowed at every length, as its training left them; the policy `llama3` does so beyond a
            length.

    Raises:
        ConfigError: for sections that a head has no room for, and numbers out of their ranges.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        axes: int = 2,
        heads: int | None = None,
        base: float | tuple[float, ...] | None = None,
        step: float | tuple[float, ...] = 1.0,
        start: float | tuple[float, ...] = 0.0,
        sections: tuple[int, ...] | None = None,
        partial: float = 1.0,
        zeros: int = 0,
        order: str = "axis",
        bank: str = "own",
        llama3: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.base = (10_000.0 if axes == 1 else 100.0) if base is None else base
        self.sections = Sections(head_dim, axes, self.base, step, heads, sections, partial, zeros, order, bank, llama3)
        self.start = of_each(start, axes, "a finite start", math.isfinite)

    @property
    def even(self) -> bool:
        """Whether it is that of timm: no option but `base`."""
        return self.sections.even and set(self.sections.steps) == {1.0} and not any(self.start)

    def angle(self, at: Positions) -> AxialAngles | SectionAngles:
        return super().angle(started(at, self.start))

    def extra_repr(self) -> str:
        return f"{self.sections}, start={self.start}"


class MixedRoPE(DirectionalRoPE):
    """Learned frequencies, one set for each head and block.

    Options say what it starts from, those of `rope` along axes turned at random per head, but for pairs that are left
    over: these stand still and have no parameters.

    Args:
        head_dim: Dh, even.
        heads: H.
        axes: d.
        base, step: of the magnitudes it starts from, one number or one of each (turned) axis.
        start: the coordinate of the first patch; see `AxialRoPE`.
        sections, partial, zeros, order, bank: see `AxialRoPE`. Those of `zeros` start at 0, and learn.

    Raises:
        ConfigError: for sections that a head has no room for, and numbers out of their ranges.
    """

    per_block = True

    def __init__(
        self,
        head_dim: int,
        heads: int,
        *,
        axes: int = 2,
        base: float | tuple[float, ...] = 10.0,
        step: float | tuple[float, ...] = 1.0,
        start: float | tuple[float, ...] = 0.0,
        sections: tuple[int, ...] | None = None,
        partial: float = 1.0,
        zeros: int = 0,
        order: str = "axis",
        bank: str = "own",
    ) -> None:
        super().__init__()
        self.sections = Sections(head_dim, axes, base, step, heads, sections, partial, zeros, order, bank)
        self.start, count = of_each(start, axes, "a finite start", math.isfinite), sum(self.sections.shares)
        shape = (count, self.sections.turning) if order == "head" else (heads, count)
        self.freqs = nn.Parameter(torch.empty(axes, *shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        axes, heads, pairs = self.freqs.shape
        device = float64_device(self.freqs.device)
        along = self.sections.frequencies(device)[:, :heads, :pairs]  # (d, 1|H, n)
        turned = torch.stack([_random_axes(axes, device) for _ in range(heads)])  # (H, d, d)
        # A pair of axis a of head h turns along the a-th turned axis; one product is not 0.
        self.freqs.copy_((turned.permute(1, 2, 0)[..., None] * along[:, None]).sum(0))

    def frequencies(self, device: torch.device) -> Tensor:
        w = self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))
        heads, pairs = (self.sections.heads or 0) - w.shape[1], self.sections.pairs - w.shape[2]
        return F.pad(w, (0, pairs, 0, heads)) if heads or pairs else w

    @property
    def even(self) -> bool:
        """Whether it is that of timm, whose frequencies are all learned."""
        return self.freqs.shape[1:] == (self.sections.heads, self.sections.pairs) and not any(self.start)

    def angle(self, at: Positions) -> LinearAngles | AxialAngles | SectionAngles:
        return super().angle(started(at, self.start))

    def extra_repr(self) -> str:
        return f"{self.sections}, start={self.start}"


def _check_axes(at: Positions, axes: int) -> None:
    if len(at.extent) != axes:
        raise ValueError(f"the frequencies have {axes} axes, the positions {at.axes}")


def started(at: Positions, start: tuple[float, ...]) -> Positions:
    """The places counted from another coordinate of the first patch."""
    if not any(start):
        return at
    if len(set(start)) == 1:
        return Positions(at.coords + start[0], at.extent)
    _check_axes(at, len(start))
    first = numbers(start, at.coords.device)
    return Positions(at.coords + first.to(at.coords.device, at.coords.dtype), at.extent)


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
