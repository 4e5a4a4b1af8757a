"""`rope(axes=(1, 2))`: an encoding of some axes of a grid; along the others it gives the same everywhere.

    signal(p) = signal of the encoding at (p_a for a in axes), on a grid of those sizes

So rows and columns have one encoding and time another: `learned(axes=(1, 2))+learned(axes=0)` are the tables of space
and of time of TimeSformer (arXiv 2102.05095), `rope(axes=(1, 2))` rotates in every frame as it does in an image.
Parameters are those of the encoding on the smaller grid, under their names, and policies measure these axes alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions

T = TypeVar("T")


@dataclass(frozen=True)
class Along:
    """The axes that an encoding reads, in the order in which it reads them."""

    axes: tuple[int, ...]

    def places(self, at: Positions) -> Positions:
        """Places on these axes, the same object for every block of a forward."""
        return at.memoize(self, lambda: self._places(at))

    def _places(self, at: Positions) -> Positions:
        coords = torch.stack([at.coords[..., axis] for axis in self.axes], dim=-1)
        spacing = at.spacing and self.of(at.spacing)
        if isinstance(at.extent, Tensor):
            extent = torch.stack([at.extent[..., axis] for axis in self.axes], dim=-1)
            return replace(at, coords=coords, extent=extent, spacing=spacing, box=at.box and self.of(at.box))
        return replace(at, coords=coords, extent=self.of(at.extent), spacing=spacing)

    def of(self, sizes: tuple[T, ...]) -> tuple[T, ...]:
        """What belongs to these axes of one thing for each axis."""
        return tuple(sizes[axis] for axis in self.axes)


class HasAxes(Protocol):
    along: Along | None


def extent_of(encoding: HasAxes, grid: tuple[int, ...]) -> tuple[int, ...]:
    """The part of a model's grid that an encoding of it is on."""
    return grid if encoding.along is None else encoding.along.of(grid)


def read_axes(given: object, axes: int) -> Along:
    """The option `axes`: one axis, or several.

    Raises:
        ConfigError: for what are no axes of the grid.
    """
    several = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    found = tuple(a for a in several if isinstance(a, int) and not isinstance(a, bool) and 0 <= a < axes)
    if not found or found != several or len(set(found)) < len(found):
        raise ConfigError(
            f"axes names axes of the grid, from 0 to {axes - 1}, as in axes=0 or axes=(1, 2); got {given!r}"
        )
    return Along(found)
