"""Resolution policies: what an encoding does at an extent it was not trained at.

A policy scales each axis on its own; s = (span / training extent) ^ power of an axis, and power is 1 by default. The
span is the extent, times the spacing where a grid has one (`Positions.span`):

    extrapolate   coordinates as they are                        formulas
    interpolate   coordinates divided by s, where a table is     all      (arXiv 2306.15595)
                  read between its entries
    ntk           rotary frequencies w_i -> w_i s^(-t_i)         rotary   ("NTK-aware" base change)
    yarn          between extrapolate and interpolate by         rotary   (arXiv 2309.00071)
                  how often a frequency turns over the training extent
    resize        the table is resized to the extent             tables
    subtable      the middle of the table, at scale 1            tables, up to their size

t_i runs from 0 at the highest frequency to 1 at the lowest. Between extrapolate (power 0) and the policy itself (power
1), and beyond, lie the powers: interpolate(power=0.5), or one of each axis, rows first: interpolate(power=(0.5, 1)).

With a length temperature, logits are multiplied by (ln N / ln N_train) ^ power (arXiv 2202.12172), so that attention
keeps its peak among more keys; N is the product of the extent, prefix tokens not counted. At scale 1 no policy changes
a bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..encodings.tables import RESIZES
from ..errors import ConfigError, unknown
from ..positions import Positions, numbers

Extent = tuple[int, ...]
Span = tuple[float, ...]  # what a grid covers, in patches of training
Power = float | tuple[float, ...]  # one for all axes, or one of each
MOST = 8.0  # a power beyond it leaves nothing of the places


@dataclass(frozen=True)
class Keep:
    """`extrapolate`: what a formula does by itself.

    Args:
        train: the training extent.
        name: as it is specified.
    """

    train: Extent
    name: str = "extrapolate"

    def place(self, at: Positions) -> Positions:
        return at

    def rescale(self, frequencies: Tensor, span: Span) -> Tensor:
        return frequencies

    def resize(self, table: Tensor, sizes: Extent, own: str, axis: int) -> Tensor:
        return RESIZES[own](table, sizes)


@dataclass(frozen=True)
class Scaled(Keep):
    """What scales by s = (span / training extent) ^ power.

    Args:
        power: of every axis, or one of each.
    """

    power: Power = 1.0

    def __post_init__(self) -> None:
        powers = _powers(self.power, len(self.train))
        if len(powers) != len(self.train) or not all(_is_power(power) for power in powers):
            raise ConfigError(
                f"power of {self.name} must be one number or {len(self.train)}, one of each axis, within {MOST:g} of "
                f"0; got {self.power!r}"
            )

    def growth(self, span: Span) -> list[float | Tensor]:
        """s of each axis, that of one that shrank 1."""
        return [s**p for s, p in zip(_growth(self.train, span), _powers(self.power, len(span)), strict=True)]


@dataclass(frozen=True)
class Resize(Scaled):
    """`resize`: tables are resized to the extent; by another power of the scale to T s places, of which the middle is
    kept, or whose ends are repeated.

    Args:
        mode: a word of `encodings.tables.RESIZES` that the tables of the model can take; default: each its own.
    """

    name: str = "resize"
    mode: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is not None and self.mode not in RESIZES:
            raise unknown("mode of resize", self.mode, RESIZES)

    def resize(self, table: Tensor, sizes: Extent, own: str, axis: int) -> Tensor:
        how = RESIZES[self.mode or own]
        powers = _powers(self.power, len(self.train))[axis : axis + len(sizes)]
        if all(power == 1 for power in powers):
            return how(table, sizes)
        # The size nearest to T s that leaves as much on both sides; so a table over offsets keeps its middle.
        scaled = [old * (new / old) ** p for old, new, p in zip(table.shape[1:], sizes, powers, strict=True)]
        between = tuple(
            max(new % 2 or 2, new - 2 * math.ceil((new - s) / 2 - 0.5)) for new, s in zip(sizes, scaled, strict=True)
        )
        table = how(table, between)
        for dim, (old, new) in enumerate(zip(between, sizes, strict=True), start=1):
            index = torch.arange(new, device=table.device) - (new - old) // 2
            table = table.index_select(dim, index.clamp(0, old - 1))
        return table


_SHIFT = {"half_pixel": 0.5, "corner": 0.0, "one": 1.0}


@dataclass(frozen=True)
class Interpolate(Scaled):
    """Places scaled into the training extent, or by another power of the scale.

    Args:
        align: "half_pixel" keeps the outer edges of the grid in place: (p + 1/2) / s - 1/2; "corner" keeps the first
            place: p / s, as EVA-02 does; "one" counts places from 1: (p + 1) / s - 1, as the Perception Encoder does.
    """

    name: str = "interpolate"
    align: str = "half_pixel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align not in _SHIFT:
            raise unknown("align of interpolate", self.align, _SHIFT)

    def place(self, at: Positions) -> Positions:
        if not torch.compiler.is_compiling() and not at.spacing and at.extent == self.train:
            return at
        return at.memoize(self, lambda: self._scaled(at))  # the same object for every block of a forward

    def _scaled(self, at: Positions) -> Positions:
        powers = _powers(self.power, len(self.train))
        scales = [(t / e) ** p for t, e, p in zip(self.train, at.span, powers, strict=True)]
        exact, shift = numbers(scales, at.coords.device), _SHIFT[self.align]
        ratio = exact.to(at.coords.device, at.coords.dtype)
        made = Positions((at.coords + shift) * ratio - shift, self.train, at.prefix)
        object.__setattr__(made, "source", (at.with_prefix(at.prefix), exact))  # a copy of them: no circle
        if at.on_grid:  # then nobody need look at these
            least = [shift * s - shift for s in scales]
            made.assume(least, [low + (e - 1) * s for low, e, s in zip(least, at.extent, scales, strict=True)])
        return made


@dataclass(frozen=True)
class Subtable(Keep):
    """`subtable`: of a table on the training grid the middle is used, at scale 1, as training on parts of a larger
    table leaves it (RADIO's cropped position embedding, arXiv 2412.07679, whose parts are also of several scales).

    Where as much cannot be left on both sides, the side of the last row or column has one more.
    """

    name: str = "subtable"

    def place(self, at: Positions) -> Positions:
        if not torch.compiler.is_compiling() and at.extent == self.train:
            return at
        return at.memoize(self, lambda: self._in_the_middle(at))

    def _in_the_middle(self, at: Positions) -> Positions:
        if any(size > most for size, most in zip(at.extent, self.train, strict=True)):
            table, grid = ("x".join(map(str, extent)) for extent in (self.train, at.extent))
            raise ConfigError(
                f"subtable takes a part of a table of {table} places, and the grid has {grid}: there `resize` or "
                "`interpolate`, or train on a larger table"
            )
        first = numbers(middle(at.extent, self.train), at.coords.device)
        return Positions(
            at.coords + first.to(at.coords.device, at.coords.dtype), self.train, at.prefix, at.on_grid, at.spacing
        )


def middle(extent: Extent, table: Extent) -> list[int]:
    """Where along each axis the middle part of a larger table begins."""
    return [(most - size) // 2 for size, most in zip(extent, table, strict=True)]


@dataclass(frozen=True)
class NTK(Scaled):
    """Low frequencies slowed by the scale, the highest kept; an axis that shrank keeps all.

    For a geometric bank it is base -> base · s^(c / (c - 2)) with c channels on that axis.
    """

    name: str = "ntk"

    def rescale(self, frequencies: Tensor, span: Span) -> Tensor:
        grown = self.growth(span)
        if all(_is_one(s) for s in grown):
            return frequencies
        size = frequencies.norm(dim=0)  # (1|H, Dh/2)
        top = size.amax(-1, keepdim=True)
        low = torch.where(size > 0, size, top).amin(-1, keepdim=True)
        octaves = (top / low).log()
        depth = torch.where(octaves > 0, (top / size.clamp(min=low)).log() / octaves.clamp(min=1e-12), 0.0)
        return torch.stack([w * s ** (-depth) for w, s in zip(frequencies, grown, strict=True)])


@dataclass(frozen=True)
class YaRN(Scaled):
    """Frequencies that turn often over the training extent kept, those that turn seldom interpolated.

    Args:
        beta_fast, beta_slow: turns over the training extent above which a frequency is kept and below which it is
            divided by s; in between, linear in the logarithm. Default on a line: 32 and 1, the paper's, tuned for
            text of thousands of tokens. On images no frequency turns 32 times, and those values would only
            interpolate; there the default is 1 and 1/4.
    """

    name: str = "yarn"
    beta_fast: float | None = None
    beta_slow: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fast, slow = self.betas
        if not fast > slow > 0:
            raise ConfigError(f"yarn needs beta_fast > beta_slow > 0, got {fast} and {slow}")

    @property
    def betas(self) -> tuple[float, float]:
        fast, slow = (32.0, 1.0) if len(self.train) == 1 else (1.0, 0.25)
        return self.beta_fast or fast, self.beta_slow or slow

    def rescale(self, frequencies: Tensor, span: Span) -> Tensor:
        grown = self.growth(span)
        rows, (fast, slow) = [], self.betas
        for w, s, length in zip(frequencies, grown, self.train, strict=True):
            turns = (w.abs() * length / (2 * math.pi)).clamp(min=1e-30)
            keep = (turns / slow).log() / math.log(fast / slow)
            rows.append(w if _is_one(s) else w * (1 / s + (1 - 1 / s) * keep.clamp(0, 1)))
        return torch.stack(rows)


@dataclass(frozen=True)
class LogTemperature:
    """(ln N / ln N_train) ^ power."""

    train: Extent
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_power("log", self.power)

    def __call__(self, extent: Extent) -> float | Tensor:
        if torch.compiler.is_compiling():
            return (_traced(math.prod(extent)).log() / math.log(math.prod(self.train))) ** self.power
        factor: float = (math.log(math.prod(extent)) / math.log(math.prod(self.train))) ** self.power
        return factor


@dataclass(frozen=True)
class YaRNTemperature:
    """(0.1 ln s + 1) ^ (2 power), s the growth of the side (the geometric mean over axes), as YaRN scales logits."""

    train: Extent
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_power("yarn", self.power)

    def __call__(self, extent: Extent) -> float | Tensor:
        if torch.compiler.is_compiling():
            growth = _traced(math.prod(extent)) / math.prod(self.train)
            return (0.1 / len(extent) * growth.clamp(min=1).log() + 1) ** (2 * self.power)
        s = (math.prod(extent) / math.prod(self.train)) ** (1 / len(extent))
        factor: float = (0.1 * math.log(s) + 1) ** (2 * self.power) if s > 1 else 1.0
        return factor


def _check_power(name: str, power: float) -> None:
    if not _is_power(power):
        raise ConfigError(f"power of the temperature {name} must be a number within {MOST:g} of 0, got {power!r}")


def _is_power(power: object) -> bool:
    return isinstance(power, int | float) and not isinstance(power, bool) and abs(power) <= MOST


def _powers(power: Power, axes: int) -> tuple[float, ...]:
    if isinstance(power, (tuple, list)):  # torch before 2.11 compiles no `tuple | list`
        return tuple(power)
    return (power,) * axes


def _traced(number: float) -> Tensor:
    """While tracing, a size as a 0-d tensor: a Python float made of it would be a constant, and every size a graph."""
    return torch.full((), number, dtype=torch.float64)


def _growth(train: Extent, span: Span) -> list[float | Tensor]:
    if torch.compiler.is_compiling():
        return [(_traced(e) / t).clamp(min=1) for t, e in zip(train, span, strict=True)]
    return [max(1.0, e / t) for t, e in zip(train, span, strict=True)]


def _is_one(growth: float | Tensor) -> bool:
    """Known to be 1; a traced one is not known, and the formulas give the same then."""
    return not isinstance(growth, Tensor) and growth == 1


POLICIES = {
    "extrapolate": Keep,
    "resize": Resize,
    "subtable": Subtable,
    "interpolate": Interpolate,
    "ntk": NTK,
    "yarn": YaRN,
}
TEMPERATURES: dict[str, type[LogTemperature] | type[YaRNTemperature]] = {"log": LogTemperature, "yarn": YaRNTemperature}
WHY_NOT = {
    "extrapolate": "a table has no entries beyond the grid it was learned on",
    "resize": "it is a formula and has no table to resize",
    "interpolate": "it takes whole coordinates only",
    "subtable": "it is a formula and has no table to take a part of",
    "ntk": "it has no rotary frequencies",
    "yarn": "it has no rotary frequencies",
}
