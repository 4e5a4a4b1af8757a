"""What every resolution policy has: the training extent, and the growth of each axis; see `policies.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..encodings.along import Along
from ..encodings.tables import RESIZES
from ..errors import ConfigError
from ..grids import Span
from ..positions import Positions

Extent = tuple[int, ...]
Power = float | tuple[float, ...]  # one for all axes, or one of each
MOST = 8.0  # a power beyond it leaves nothing of the places


@dataclass(frozen=True)
class Keep:
    """`extrapolate`: what a formula does by itself.

    Args:
        train: the training extent.
        name: as it is specified.
    """

    like: ClassVar[str] = ""  # the policy of which this is a kind: what can take that one can take this
    train: tuple[int, ...]  # spelled out: settings are checked by the names of the class that inherits it
    name: str = "extrapolate"

    @property
    def kind(self) -> str:
        """What an encoding declares that can take it."""
        return self.like or self.name

    def on(self, along: Along) -> Keep:
        """The same for some of the axes."""
        return replace(self, train=along.of(self.train))

    def place(self, at: Positions) -> Positions:
        return at

    def rescale(self, frequencies: Tensor, extent: Span) -> Tensor:
        return frequencies

    def resize(self, table: Tensor, sizes: Extent, own: str, axis: int) -> Tensor:
        return RESIZES[own](table, sizes)

    def resized_to(self, grid: Tensor, old: Extent, own: str, axis: int) -> tuple[str, Tensor]:
        """The way, and the sizes, in which a table of the sizes `old` serves grids of sizes (..., d), float64."""
        return own, grid


@dataclass(frozen=True)
class Scaled(Keep):
    """What scales by s = (extent / training extent) ^ power.

    Args:
        power: of every axis, or one of each.
    """

    power: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        powers = powers_of(self.power, len(self.train))
        if len(powers) != len(self.train) or not all(is_power(power) for power in powers):
            raise ConfigError(
                f"power of {self.name} must be one number or {len(self.train)}, one of each axis, within {MOST:g} of "
                f"0; got {self.power!r}"
            )

    def on(self, along: Along) -> Keep:
        return replace(self, train=along.of(self.train), power=along.of(powers_of(self.power, len(self.train))))

    def growth(self, extent: Span) -> list[float | Tensor]:
        """s of each axis, that of one that shrank 1; see `growth_of`."""
        powers = powers_of(self.power, len(self.train))
        return [s**p for s, p in zip(growth_of(self.train, extent), powers, strict=True)]


def is_power(power: object) -> bool:
    return isinstance(power, int | float) and not isinstance(power, bool) and abs(power) <= MOST


def powers_of(power: Power, axes: int) -> tuple[float, ...]:
    if isinstance(power, (tuple, list)):  # torch before 2.11 compiles no `tuple | list`
        return tuple(power)
    return (power,) * axes


def traced(number: float) -> Tensor:
    """While tracing, a size as a 0-d tensor: a Python float made of it would be a constant, and every size a graph."""
    return torch.full((), number, dtype=torch.float64)


def growth_of(train: Extent, extent: Span) -> list[float | Tensor]:
    """By how much each axis is longer, at least 1; of extents (B|1, N|1, d) by sample (B|1, N|1, 1, 1), which meet
    frequencies (1|H, Dh/2)."""
    if isinstance(extent, Tensor):
        return [(e / t).clamp(min=1)[..., None, None] for t, e in zip(train, extent.unbind(-1), strict=True)]
    if torch.compiler.is_compiling():
        return [(traced(e) / t).clamp(min=1) for t, e in zip(train, extent, strict=True)]
    return [max(1.0, e / t) for t, e in zip(train, extent, strict=True)]


def is_one(growth: float | Tensor) -> bool:
    """Known to be 1; a traced one is not known, and the formulas give the same then."""
    return not isinstance(growth, Tensor) and growth == 1
