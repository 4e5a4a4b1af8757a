"""Resolution policies: what an encoding does at an extent it was not trained at.

A policy scales each axis on its own; s = (span / training extent) ^ power of an axis, and power is 1 by default. The
span is the extent, times the spacing where a grid has one (`Positions.span`):

    extrapolate   coordinates as they are                        formulas
    interpolate   coordinates divided by s, where a table is     all      (arXiv 2306.15595)
                  read between its entries
    ntk           rotary frequencies w_i -> w_i s^(-t_i)         rotary   ("NTK-aware" base change)
    yarn          between extrapolate and interpolate by         rotary   (arXiv 2309.00071; "NTK by parts" is yarn
                  how often a frequency turns over the                    without a temperature)
                  training extent, linear in the logarithm
    llama3        likewise, linear in the turns                  rotary   (transformers, `modeling_rope_utils.py`)
    longrope      frequencies divided by a factor for each pair  rotary   (arXiv 2402.13753)
    resize        the table is resized to the extent             tables
    subtable      the middle of the table, at scale 1            tables, up to their size

t_i runs from 0 at the highest frequency of an axis to 1 at the lowest, and a frequency of 0 stays 0. Between
extrapolate (power 0) and the policy itself (power 1), and beyond, lie the powers: interpolate(power=0.5), or one of
each axis, rows first: interpolate(power=(0.5, 1)). What can take yarn can take llama3 and longrope.

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
from .rotary import NTK, Llama3, LongRoPE, YaRN
from .scaled import MOST, Extent, Keep, Scaled, is_power, powers_of, traced


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
        powers = powers_of(self.power, len(self.train))[axis : axis + len(sizes)]
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

    def resized_to(self, grid: Tensor, old: Extent, own: str, axis: int) -> tuple[str, Tensor]:
        how, powers = self.mode or own, powers_of(self.power, len(self.train))[axis : axis + len(old)]
        if all(power == 1 for power in powers):
            return how, grid
        sizes = []
        for new, count, power in zip(grid.unbind(-1), old, powers, strict=True):
            half = (new - count * (new / count) ** power) / 2 - 0.5
            nearest = new - 2 * (half - 1e-9).ceil()  # a half that is one by rounding alone is not rounded up
            sizes.append(nearest.maximum(2 - new % 2))
        return how, torch.stack(sizes, dim=-1)


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
        if not torch.compiler.is_compiling() and not at.spacing and at.is_on(self.train):
            return at
        return at.memoize(self, lambda: self._scaled(at))  # the same object for every block of a forward

    def _scaled(self, at: Positions) -> Positions:
        powers = powers_of(self.power, len(self.train))
        shift = _SHIFT[self.align]
        scales: list[float] = []
        if isinstance(at.extent, Tensor):
            train, power = (numbers(each, at.coords.device) for each in (self.train, powers))
            exact = (train / at.spans()) ** power  # (B|1, N|1, d)
        else:
            scales = [(t / e) ** p for t, e, p in zip(self.train, at.span, powers, strict=True)]
            exact = numbers(scales, at.coords.device)  # (d,)
        ratio = exact.to(at.coords.device, at.coords.dtype)
        coords = (at.coords + shift) * ratio - shift
        made = Positions(coords, self.train, at.prefix, valid=at.valid, segment=at.segment)
        object.__setattr__(made, "source", (at.with_prefix(at.prefix), exact))  # a copy of them: no circle
        if at.on_grid and scales:  # then nobody need look at these
            least = [shift * s - shift for s in scales]
            made.assume(least, [low + (e - 1) * s for low, e, s in zip(least, at.one_extent, scales, strict=True)])
        return made


@dataclass(frozen=True)
class Subtable(Keep):
    """`subtable`: of a table on the training grid the middle is used, at scale 1, as training on parts of a larger
    table leaves it (RADIO's cropped position embedding, arXiv 2412.07679, whose parts are also of several scales).

    Where as much cannot be left on both sides, the side of the last row or column has one more.
    """

    name: str = "subtable"

    def place(self, at: Positions) -> Positions:
        if not torch.compiler.is_compiling() and at.is_on(self.train):
            return at
        return at.memoize(self, lambda: self._in_the_middle(at))

    def _in_the_middle(self, at: Positions) -> Positions:
        if not at.largest:
            raise ConfigError(
                "subtable takes a part of a table, and how large these grids by sample are is not known: give "
                "Positions a box, or make them by Positions.grids"
            )
        if any(size > most for size, most in zip(at.largest, self.train, strict=True)):
            table, grid = ("x".join(map(str, extent)) for extent in (self.train, at.largest))
            raise ConfigError(
                f"subtable takes a part of a table of {table} places, and the grid has {grid}: there `resize` or "
                "`interpolate`, or train on a larger table"
            )
        if isinstance(at.extent, Tensor):
            first = ((numbers(self.train, at.coords.device) - at.sizes(prefix=False)) / 2).floor()
        else:
            first = numbers(middle(at.extent, self.train), at.coords.device)
        coords = at.coords + first.to(at.coords.device, at.coords.dtype)
        return Positions(coords, self.train, at.prefix, at.on_grid, at.spacing, at.valid, at.segment)


def middle(extent: Extent, table: Extent) -> list[int]:
    """Where along each axis the middle part of a larger table begins."""
    return [(most - size) // 2 for size, most in zip(extent, table, strict=True)]


@dataclass(frozen=True)
class LogTemperature:
    """(ln N / ln N_train) ^ power.

    Raises:
        ConfigError: for a grid of training of one place, whose logarithm is 0; and at such a grid, where known, for a
            power below 0.
    """

    train: Extent
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_power("log", self.power)
        if math.prod(self.train) == 1:
            raise ConfigError("the temperature log divides by ln N_train, and a grid of training of one place has 0")

    def __call__(self, extent: Extent | Tensor) -> float | Tensor:
        if isinstance(extent, Tensor):
            return (extent.prod(-1).log() / math.log(math.prod(self.train))) ** self.power
        if torch.compiler.is_compiling():
            return (traced(math.prod(extent)).log() / math.log(math.prod(self.train))) ** self.power
        if self.power < 0 and math.prod(extent) == 1:
            raise ConfigError(f"the temperature log(power={self.power:g}) divides by ln N, and one place has 0")
        factor: float = (math.log(math.prod(extent)) / math.log(math.prod(self.train))) ** self.power
        return factor


@dataclass(frozen=True)
class YaRNTemperature:
    """(0.1 ln s + 1) ^ (2 power), s the growth of the side (the geometric mean over axes), as YaRN scales logits."""

    train: Extent
    power: float = 1.0

    def __post_init__(self) -> None:
        _check_power("yarn", self.power)

    def __call__(self, extent: Extent | Tensor) -> float | Tensor:
        if isinstance(extent, Tensor) or torch.compiler.is_compiling():
            number = extent.prod(-1) if isinstance(extent, Tensor) else traced(math.prod(extent))
            growth = number / math.prod(self.train)
            return (0.1 / len(self.train) * growth.clamp(min=1).log() + 1) ** (2 * self.power)
        s = (math.prod(extent) / math.prod(self.train)) ** (1 / len(extent))
        factor: float = (0.1 * math.log(s) + 1) ** (2 * self.power) if s > 1 else 1.0
        return factor


def _check_power(name: str, power: float) -> None:
    if not is_power(power):
        raise ConfigError(f"power of the temperature {name} must be a number within {MOST:g} of 0, got {power!r}")


POLICIES: dict[str, type[Keep]] = {
    "extrapolate": Keep,
    "resize": Resize,
    "subtable": Subtable,
    "interpolate": Interpolate,
    "ntk": NTK,
    "yarn": YaRN,
    "llama3": Llama3,
    "longrope": LongRoPE,
}
TEMPERATURES: dict[str, type[LogTemperature] | type[YaRNTemperature]] = {"log": LogTemperature, "yarn": YaRNTemperature}
WHY_NOT = {
    "extrapolate": "a table has no entries beyond the grid it was learned on",
    "resize": "it is a formula and has no table to resize",
    "interpolate": "it takes whole coordinates only",
    "subtable": "it is a formula and has no table to take a part of",
    "ntk": "it has no rotary frequencies",
    "yarn": "it has no rotary frequencies",
    "llama3": "it has no rotary frequencies",
    "longrope": "it has no rotary frequencies",
}


def kind_of(name: str) -> str:
    """The policy that an encoding declares which can take this one: "yarn" of "llama3"."""
    return POLICIES[name].like or name if name in POLICIES else name
