"""The rotary encodings: turn queries and keys by angles that are linear in the coordinates.

    angle_i(p) = ⟨w_i, p⟩   for pair i of Dh/2,   so that ⟨R(q) x, R(k) y⟩ depends on q - k alone

A rotary encoding is its frequency vectors w, (d, 1|H, Dh/2) radians per patch:

    rope         one axis each: pairs [a K, (a + 1) K) turn with coordinate a at base^(-k/K), K = ⌊Dh/2d⌋
    rope_mixed   learned, per head and block; drawn as `rope` with base 10 along turned axes    (rope_mixed.py)
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
    preset=flux                of `rope`: the options of a released convention (presets.py); those beside it win

An exponent over another count K' is a base: base^(K/K') ^ (-k/K) = base^(-k/K'); modded-nanogpt has K' = K - 1.

Sources: RoFormer, arXiv 2104.09864; RoPE for ViT, arXiv 2403.13298, `models/vit_rope.py`; timm, `pos_embed_sincos.py`.

How ours differs: any number of axes, rows before columns (rope-vit has columns first), any places, float64 angles for
the fixed ones. Pairs are (2i, 2i+1), as in rope-vit and timm; half-split checkpoints are permuted on loading.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grids import Span
from ..positions import Positions, float64_device, numbers
from .base import Policy
from .linear import DirectionalRoPE, other_axes
from .rotary_options import of_each
from .sections import Sections


class AxialAngles(NamedTuple):
    """Of axes with as many pairs each, angle_(a, k)(p) = w[a, k] p_a: one product, and no zeros added.

    Args:
        coords: (B|1, N, d), of any precision.
        w: (d, K) radians per patch, or those of each token, (B|1, N|1, d, K).
        interleaved: the pairs of a frequency beside each other, an axis after the other; else those of an axis.
        rest: pairs behind them that stand still.
    """

    coords: Tensor
    w: Tensor
    interleaved: bool = False
    rest: int = 0

    def resolve(self, policy: Policy | None, span: Span, prefix: int) -> Tensor:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        w = self.w
        if policy is not None:
            unit = torch.eye(len(w), dtype=w.dtype, device=w.device)[None]
            rows = AxialAngles(unit, w, self.interleaved, self.rest).dense()[0].transpose(0, 1)  # (d, 1, Dh/2)
            flat = _rescaled(policy, rows, span)[..., 0, : w.numel()]
            w = flat.unflatten(-1, w.mT.shape).mT if self.interleaved else flat.unflatten(-1, w.shape)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords
        return AxialAngles(coords, w, self.interleaved, self.rest).dense()

    def dense(self) -> Tensor:
        """(B|1, 1, N, Dh/2)"""
        w = self.w if self.w.ndim == 2 else self.w[:, None]
        if self.interleaved:
            angle = (self.coords[:, None, :, None] * w.mT.contiguous()).flatten(-2)
        else:
            angle = (self.coords[:, None, :, :, None] * w).flatten(-2)
        return F.pad(angle, (0, self.rest)) if self.rest else angle


class SectionAngles(NamedTuple):
    """Of any pairs: one gather of coordinates and one product.

    Args:
        coords: (B|1, N, d), of any precision.
        axis: (1, Dh/2) of each pair, or (H, 1) of each head, int64.
        w: (1|H, Dh/2) radians per patch, 0 of pairs that stand still, or those of each token, (B|1, N|1, 1|H, Dh/2).
    """

    coords: Tensor
    axis: Tensor
    w: Tensor

    def resolve(self, policy: Policy | None, span: Span, prefix: int) -> Tensor:
        """With the frequencies of a policy, behind `prefix` tokens that do not turn; see `Angles`."""
        w = self.w
        if policy is not None:
            axes = torch.arange(self.coords.shape[-1], device=w.device)
            w = _rescaled(policy, (self.axis == axes[:, None, None]) * w, span)
        coords = F.pad(self.coords, (0, 0, prefix, 0)) if prefix else self.coords
        return SectionAngles(coords, self.axis, w).dense()

    def dense(self) -> Tensor:
        """(B|1, 1|H, N, Dh/2)"""
        places = self.coords.index_select(-1, self.axis.flatten())  # (B|1, N, Dh/2), or (B|1, N, H)
        of_pairs = places[:, None] if len(self.axis) == 1 else places.mT[..., None]
        return of_pairs * (self.w[:, None] if self.w.ndim == 2 else self.w.transpose(1, 2))


def _rescaled(policy: Policy, rows: Tensor, span: Span) -> Tensor:
    """(1|H, Dh/2) frequencies under a policy, of (d, 1|H, Dh/2) that have one axis each; (B|1, N|1, 1|H, Dh/2) of spans
    by sample.

    An axis is given as if it were a head, so that its fastest and slowest pairs are its own.
    """
    if rows.shape[1] > 1:
        return policy.rescale(rows, span).sum(0)
    each = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)[..., None] * rows  # (d, d, Dh/2)
    return policy.rescale(each, span).sum((0, -2)).unsqueeze(-2)


def angles_of(of: Sections, coords: Tensor) -> AxialAngles | SectionAngles:
    """At coords (B|1, N, d); frequencies are float64 where their device has it, else on the CPU."""
    if of.order != "head" and len(set(of.shares)) == 1:
        w = _banks(of, coords.device)
        rest = of.pairs - sum(of.shares)
        return AxialAngles(coords.to(w.device), w, of.order == "interleaved", rest)
    w = _spread(of, coords.device)
    return SectionAngles(coords.to(w.device), _axis_of(of, w.device), w)


def frequencies_of(of: Sections, device: torch.device) -> Tensor:
    """(d, 1|H, Dh/2): the angles at the unit vectors."""
    unit = torch.eye(of.axes, dtype=torch.float64, device=float64_device(device))
    return angles_of(of, unit[None]).dense()[0].transpose(0, 1)


def _banks(of: Sections, device: torch.device) -> Tensor:
    """(d, K), for axes of as many pairs each."""
    if of.bank == "own" and len(set(of.bases)) == len(set(of.steps)) == 1:
        return _bank(of, 0, device).expand(of.axes, -1)
    banks = [_bank(of, axis, device) for axis in range(of.axes)]
    return torch.stack(banks if of.bank == "own" else [b[of.slot(a)] for a, b in enumerate(banks)])


def _bank(of: Sections, axis: int, device: torch.device) -> Tensor:
    """(K_a,), or (n,) where a bank is that of all pairs."""
    count = of.shares[axis] if of.bank == "own" and of.order != "head" else of.turning
    bank = magnitudes(count, of.bases[axis], device)
    if of.zeros:
        bank = F.pad(bank[: count - of.zeros], (0, of.zeros))
    if of.steps[axis] != 1:
        bank = bank * of.steps[axis]
    if of.llama3 is not None:
        factor, low, high, length = of.llama3
        bank = slowed(bank, factor, (bank * (length / (2 * math.pi)) - low) / (high - low))
    return bank if of.factors is None else bank / numbers(of.factors, bank.device)


def _axis_of(of: Sections, device: torch.device) -> Tensor:
    """(1, Dh/2), or (H, 1), int64: the axis of each pair, or head. Filled there: nothing is copied from a host."""
    head = of.order == "head"
    axis = torch.zeros((of.heads or 1) if head else of.pairs, dtype=torch.long, device=device)
    for index in range(1, of.axes):
        axis[of.slot(index)] = index
    return axis[:, None] if head else axis[None]


def _spread(of: Sections, device: torch.device) -> Tensor:
    """(1|H, Dh/2) radians, for sections of any size."""
    banks = [_bank(of, axis, device) for axis in range(of.axes)]
    if of.order == "head":
        rows = torch.cat([bank.expand(heads, -1) for bank, heads in zip(banks, of.shares, strict=True)])
        return F.pad(rows, (0, of.pairs - of.turning, 0, (of.heads or 0) - len(rows)))
    count = sum(of.shares)
    if of.order == "axis":
        w = torch.cat(banks if of.bank == "own" else [b[of.slot(a)] for a, b in enumerate(banks)])
    else:
        w, axes = banks[0].new_zeros(count), _axis_of(of, banks[0].device)[0, :count]
        for axis, bank in enumerate(banks):
            mine = axes == axis
            w = w.masked_scatter(mine, bank) if of.bank == "own" else torch.where(mine, bank[:count], w)
    return F.pad(w, (0, of.pairs - count))[None]


def magnitudes(count: int, base: float, device: torch.device) -> Tensor:
    """base^(-k/K) for k < K, float64: one radian per patch first, 1/base never quite reached."""
    k = torch.arange(count, dtype=torch.float64, device=float64_device(device))
    return base ** (k / -count)


def slowed(w: Tensor, by: float | Tensor, keep: Tensor) -> Tensor:
    """Frequencies divided by a factor where `keep` is 0 or less, as they are where it is 1 or more, between them else.

    A frequency of 0 stays 0."""
    return w * (1 / by + (1 - 1 / by) * keep.clamp(0, 1))


class AlongAxes(DirectionalRoPE):
    """Fixed frequencies, each along one axis."""

    sections: Sections

    def frequencies(self, device: torch.device) -> Tensor:
        return frequencies_of(self.sections, device)

    def angle(self, at: Positions) -> AxialAngles | SectionAngles:
        if at.coords.shape[-1] != self.sections.axes:
            raise other_axes(at, self.sections.axes)
        return angles_of(self.sections, at.coords)


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
        factors: for each pair of a bank what divides its frequency, at every length, as YaRN and LongRoPE leave a
            trained model; `from_transformers` writes them.

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
        factors: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.base = (10_000.0 if axes == 1 else 100.0) if base is None else base
        pairs = (heads, sections, partial, zeros, order, bank)
        self.sections = Sections(head_dim, axes, self.base, step, *pairs, llama3, factors)
        self.start = of_each(start, axes, "a finite start", math.isfinite)

    @property
    def even(self) -> bool:
        """Whether it is that of timm: no option but `base`."""
        return self.sections.even and set(self.sections.steps) == {1.0} and not any(self.start)

    def angle(self, at: Positions) -> AxialAngles | SectionAngles:
        return super().angle(started(at, self.start))

    def extra_repr(self) -> str:
        return f"{self.sections}, start={self.start}"


def started(at: Positions, start: tuple[float, ...]) -> Positions:
    """The places counted from another coordinate of the first patch."""
    if not any(start):
        return at
    if len(set(start)) == 1:
        return at.moved(at.coords + start[0])
    if at.axes != len(start):
        raise other_axes(at, len(start))
    first = numbers(start, at.coords.device)
    return at.moved(at.coords + first.to(at.coords.device, at.coords.dtype))
