"""Tables read at fractional places: between their entries, for any table over a grid.

    f(x) = Σ_i w_i(x) table[i],    bilinear: the 2 neighbours along each axis, w = (1 - t, t), t = x - ⌊x⌋
                                   bicubic: the 4 neighbours, Keys' kernel with a = -3/4, which is torch's

At a whole coordinate the weights are 1 for its entry and 0 for the others. Along several axes they multiply.

The border: patch centres are at integers, so an image of S patches covers -1/2 to S - 1/2. Between its outermost
centres and its edge a place reads the outermost entries, as `grid_sample(padding_mode="border")` and torch's
`interpolate` have it. Farther out it is refused, wherever it can be looked at (docs/decisions/0022).

A backward keeps an index and a weight of each neighbour and place; the entries only where places want gradients.
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import product
from operator import add

import torch
from torch import Tensor

from ..errors import unknown
from ..positions import Positions, exact
from .mlp import lifted
from .tables import flat_index

SAMPLES = ("bilinear", "bicubic")
Taps = list[tuple[Tensor, Tensor]]  # of each neighbour: its index, int64, and its weight


def check_sample(name: str, sample: str) -> str:
    if sample not in SAMPLES:
        raise unknown(f"sample of {name}", sample, SAMPLES)
    return sample


def neighbours(x: Tensor, size: int | None, sample: str, wrap: bool = False) -> Taps:
    """Of coordinates x (...) along an axis of so many entries; beyond the ends the last one, or with `wrap` the first
    again. Without a size the neighbours may lie beyond."""
    low = x.floor()
    t, first = x - low, low.long()
    if sample == "bilinear":
        start, weights = 0, [1 - t, t]
    else:
        start, weights = -1, [_cubic_far(1 + t), _cubic_near(t), _cubic_near(1 - t), _cubic_far(2 - t)]
    indices = [first + start + i for i in range(len(weights))]
    if size is None:
        return list(zip(indices, weights, strict=True))
    return [(i.remainder(size) if wrap else i.clamp(0, size - 1), w) for i, w in zip(indices, weights, strict=True)]


def _cubic_near(t: Tensor) -> Tensor:  # of a distance up to 1
    return (1.25 * t - 2.25) * t * t + 1


def _cubic_far(t: Tensor) -> Tensor:  # from 1 to 2
    return -0.75 * (((t - 5) * t + 8) * t - 4)


def taps(x: Tensor, sizes: tuple[int, ...], sample: str, dtype: torch.dtype, wrap: bool = False) -> Taps:
    """The neighbours of places x (..., d), float64, in a table of these sizes that is flat; weights of this dtype.

    They depend on places and sizes alone, and serve every table of these.
    """
    return joined([neighbours(x[..., axis], size, sample, wrap) for axis, size in enumerate(sizes)], sizes, dtype)


def joined(along: list[Taps], sizes: tuple[int, ...], dtype: torch.dtype) -> Taps:
    """The neighbours in a table of these sizes that is flat, of those along each axis."""
    later = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    found = []
    for corner in product(*along):
        index, weight = corner[0][0] * later[0], corner[0][1]
        for (i, w), step in zip(corner[1:], later[1:], strict=True):
            index, weight = index + i * step, weight * w
        found.append((index, weight.to(dtype)))
    return found


def read(table: Tensor, at: Taps) -> Tensor:
    """A table (C, *sizes) at places of which these are the neighbours, (...) -> (C, ...)."""
    flat = table.flatten(1)

    def part(index: Tensor, weight: Tensor) -> Tensor:
        entries: Tensor = flat.index_select(1, index.flatten().to(flat.device)).unflatten(1, index.shape)
        return entries * weight.to(flat.device)

    return reduce(add, (part(*one) for one in at))


def check_inside(at: Positions) -> None:
    """Refuse places more than half a patch outside of the extent, wherever they can be looked at.

    Not those that a policy scaled: a power below 1 repeats the ends of a table, as `resize` does.
    """
    refuse_spacing(at)
    bounds = at.bounds()
    if bounds is None or at.source is not None:
        return
    if not (
        min(bounds.least) >= -0.501 and all(m < s - 0.499 for m, s in zip(bounds.most, at.one_extent, strict=True))
    ):
        ends = (", ".join(f"{end:g}" for end in side) for side in (bounds.least, bounds.most))
        raise ValueError(
            f"places from ({') to ('.join(ends)}) leave the grid of {at.extent}, which this table covers, by more than "
            "half a patch"
        )


def refuse_spacing(at: Positions) -> None:
    """Tables meet another extent by being resized to it, which says nothing about how large a patch is."""
    if at.spacing:
        raise ValueError(
            f"a table lies on the grid of training, and a grid of spacing {at.spacing} between its places: choose the "
            "policy interpolate, which reads it there, or an encoding by formula (sincos, rope, alibi, ...)"
        )


def read_tokens(table: Tensor, at: Positions, sample: str, *, wrap: bool = False) -> Tensor:
    """Vectors of a table (D, *sizes) at places (B|1, N, d), in float32 at least -> (B|1, N, D)."""
    wide, sizes = lifted(table), tuple(table.shape[1:])
    return read(wide, taps(exact(at.coords), sizes, sample, wide.dtype, wrap)).movedim(0, -1)


def tokens_at(table: Tensor, at: Positions, sample: str) -> Tensor:
    """Vectors of a table (D, *extent) at places (B|1, N, d) on its grid or between -> (B|1, N, D)."""
    if at.on_integers():
        return table.flatten(1).t()[flat_index(at)]
    check_inside(at)
    return read_tokens(table, at, sample)


def read_along(table: Tensor, axis: int, x: Tensor, sample: str) -> Tensor:
    """A table (C, *sizes) at coordinates x (n,) along one of its axes, counted from 0 -> (C, ..., n, ...)."""
    moved = table.transpose(1 + axis, -1)
    found = read(moved.reshape(-1, moved.shape[-1]), taps(x[:, None], moved.shape[-1:], sample, table.dtype))
    return found.reshape(*moved.shape[:-1], len(x)).transpose(1 + axis, -1)
