"""Sections: which pairs of a head turn with which axis, how fast, and which stand still.

    angle_i(p) = w_i p_(axis of i),    w_i = step_a base_a^(-k/K_a)  for the k-th of the K_a pairs of axis a

    order="axis"         pairs [K_0 + .. + K_(a-1), K_0 + .. + K_a) turn with axis a           (Flux, Wan, V-JEPA 2)
    order="interleaved"  pair i turns with axis i mod d; past d K_a, those of axis a > 0 with axis 0 (Qwen3-VL, timm)
    order="head"         whole heads turn with one axis, over all pairs; `sections` counts heads        (MHRoPE)
    bank="whole"         w_i = step_a base_a^(-i/n) for pair i of n, whichever axis it turns with (Qwen2-VL, Qwen3-VL)

Sources: diffusers `transformer_flux.py`; transformers `modeling_qwen2_vl.py`, `modeling_qwen3_vl.py`; MHRoPE, arXiv
2510.23095. How ours differs: one rule for any number of axes; pairs are (2i, 2i+1); still pairs are behind the others.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields

from ..errors import ConfigError, unknown
from .rotary_options import Each, check_slowing, of_each

ORDERS, BANKS = ("axis", "interleaved", "head"), ("own", "whole")


@dataclass(frozen=True)
class Sections:
    """The pairs of a rotary encoding; options are those of `AxialRoPE`, `axes` and `heads` those of the model.

    Raises:
        ConfigError: for sections that a head has no room for, and numbers out of their ranges.
    """

    head_dim: int
    axes: int
    base: Each
    step: Each = 1.0
    heads: int | None = None
    sections: tuple[int, ...] | None = None
    partial: float = 1.0
    zeros: int = 0
    order: str = "axis"
    bank: str = "own"
    llama3: tuple[float, ...] | None = None
    factors: tuple[float, ...] | None = None
    pairs: int = field(init=False, repr=False)  # of a head
    turning: int = field(init=False, repr=False)  # of these, what `partial` leaves
    shares: tuple[int, ...] = field(init=False, repr=False)  # of each axis: pairs, or heads
    bases: tuple[float, ...] = field(init=False, repr=False)
    steps: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise unknown("order of pairs", self.order, ORDERS)
        if self.bank not in BANKS:
            raise unknown("bank of frequencies", self.bank, BANKS)
        found = dict(
            pairs=self.head_dim // 2,
            turning=int(self.head_dim * self.partial) // 2 if 0 < self.partial <= 1 else 0,
            bases=of_each(self.base, self.axes, "base > 1", lambda base: base > 1),
            steps=of_each(self.step, self.axes, "step > 0", lambda step: step > 0),
        )
        for name, value in found.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "shares", _shares(self))
        counts = {*self.shares} - {0} if self.bank == "own" and self.order != "head" else {self.turning}
        if not 0 <= self.zeros < min(counts):
            most = min(counts)
            raise ConfigError(f"zeros are pairs of a bank of {most}, from 0 to {most - 1}; got {self.zeros}")
        check_slowing(self.llama3, self.factors, counts)

    def __str__(self) -> str:
        """The sizes, the base, and the options that are not the default."""
        own = [f for f in fields(self) if f.init and (f.default is MISSING or getattr(self, f.name) != f.default)]
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in own if f.name != "heads")

    @property
    def even(self) -> bool:
        """Whether every axis has one bank of as many pairs, one behind the other, and none stands still."""
        plain = self.order == "axis" and self.bank == "own" and not (self.zeros or self.llama3 or self.factors)
        alike = len(set(self.shares)) == len(set(self.bases)) == len(set(self.steps)) == 1
        return plain and alike and sum(self.shares) == self.pairs

    def slot(self, axis: int) -> slice:
        """Where the pairs, or heads, of an axis are; of axis 0 of unequal interleaved sections, the first ones."""
        if self.order == "interleaved":
            return slice(axis, self.shares[axis] * self.axes, self.axes)
        start = sum(self.shares[:axis])
        return slice(start, start + self.shares[axis])


def _shares(of: Sections) -> tuple[int, ...]:
    """Pairs, or heads, of each axis."""
    if of.head_dim % 2 or of.head_dim < 2:
        raise ConfigError(f"a rotary encoding turns pairs of channels and needs an even head width, got {of.head_dim}")
    if not of.turning:
        raise ConfigError(
            f"partial is the share of the {of.pairs} pairs of a head that turn, above 0, at most 1, and at least one "
            f"pair; got {of.partial}"
        )
    if of.order == "head" and of.heads is None:
        raise ConfigError("order='head' gives whole heads to an axis: say how many there are, heads=")
    room, what = (of.heads or 0, "heads") if of.order == "head" else (of.turning, "pairs of channels")
    if of.sections is None and room < of.axes:
        wider = f"a head width of at least {2 * of.axes}" if of.order != "head" else f"at least {of.axes} heads"
        raise ConfigError(
            f"a rotary encoding of {of.axes} axes needs {wider}: got {of.head_dim if of.order != 'head' else room}"
            + ("" if of.partial == 1 else f", of which partial={of.partial} turns")
        )
    shares = (room // of.axes,) * of.axes if of.sections is None else of.sections
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in shares)
    if len(shares) != of.axes or not whole or not 0 < sum(shares) <= room:
        raise ConfigError(
            f"sections are {what} of each axis, {of.axes} whole numbers whose sum is at most {room}; got {shares}"
        )
    count = sum(shares)
    taken = [len(range(axis, min(count, k * of.axes), of.axes)) for axis, k in enumerate(shares)]
    taken[0] = count - sum(taken[1:])
    if of.order == "interleaved" and tuple(taken) != shares:
        raise ConfigError(
            f"interleaved, sections {shares} would be {tuple(taken)}: every {of.axes}th pair is an axis's, and what "
            "these leave is the first one's. Write these, or order='axis'"
        )
    return tuple(shares)
