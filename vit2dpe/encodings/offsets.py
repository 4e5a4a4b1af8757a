"""Biases over offsets, q - k: of places on a lattice a table of all offsets there are, of others a matrix of all pairs.

Whole places have (2 S_1 - 1) ... (2 S_d - 1) offsets between them, and so have places that a policy scales: theirs are
the same offsets times a ratio. Both are a `Table`, which every kernel takes. Other fractional places (jitter, places of
one's own) have an offset for each pair, and their bias is a matrix, (B|1, H, Nq, Nk).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..positions import Positions, float64_device, numbers, offsets
from ..signal import Dense, Table
from .between import Taps, read, read_along, refuse_spacing, taps
from .tables import axis_offsets, check_extents

T = TypeVar("T")
Lattice = tuple[Positions, Positions, Tensor | None]


def lattice(q: Positions, k: Positions, axes: int) -> Lattice | None:
    """Whole places, of queries and keys, whose offsets times a ratio (d,) are those between q and k; None for others,
    also where the ratio is another for each sample.

    The ratio is None where it is 1.
    """
    check_extents(q, k, axes)
    if q.largest and q.on_integers() and k.on_integers():
        return q, k, None
    if q.source is None or k.source is None or q.by_sample():
        return None
    (first, ratio), (second, _) = q.source, k.source
    same = first.extent == second.extent and first.on_integers() and second.on_integers()
    return (first, second, ratio) if same else None


def along_axes(q: Positions, k: Positions, ratio: Tensor | None, axes: int, device: torch.device) -> list[Tensor]:
    """For each axis the offsets of a lattice, -(S - 1) to S - 1: int64, or float64 where they have a ratio."""
    whole = axis_offsets(q, k, axes, device)
    return whole if ratio is None else [o * r for o, r in zip(whole, ratio.to(device), strict=True)]


def all_offsets(q: Positions, k: Positions, found: Lattice | None) -> Tensor:
    """(..., d) float64 offsets q - k: of their `lattice` (2 S_1 - 1, ..., 2 S_d - 1, d), else of all pairs
    (B|1, Nq, Nk, d)."""
    if found is None:
        return torch.stack([of_pairs(q, k, axis) for axis in range(q.axes)], dim=-1)
    along = [x.double() for x in along_axes(*found, q.axes, float64_device(q.coords.device))]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), dim=-1)


def of_pairs(q: Positions, k: Positions, axis: int) -> Tensor:
    """(B|1, Nq, Nk) float64 offsets q - k of all pairs along an axis."""
    if q.source is None or k.source is None or not q.by_sample():
        return offsets(q, k, axis)
    (first, ratio), (second, _) = q.source, k.source  # of scaled places in float32 the last digits would be lost
    return offsets(first, second, axis) * ratio[..., axis, None]


def kept(q: Positions, k: Positions, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What `make` derives from offsets between q and k alone, made once for all blocks; anew where places learn."""
    if q.coords.requires_grad or k.coords.requires_grad:  # a second backward would miss what the first one freed
        return make()
    return q.memoize((*key, None if k is q else k), make)


def read_at_offsets(table: Tensor, q: Positions, k: Positions, prefix: Tensor | None, sample: str) -> Table | Dense:
    """The bias of a table (H, 2 S_1 - 1, ...) over the offsets of the extent S of q and k, read at theirs.

    Args:
        prefix: see `Table`.
        sample: a word of `between.SAMPLES`, for offsets that are no whole numbers.

    Raises:
        ValueError: for places more than half a patch outside of the extent, wherever they can be looked at.
    """
    found = lattice(q, k, table.ndim - 1)
    if found is not None:
        first, second, ratio = found
        if ratio is None:
            return Table(table, first, second, prefix)
        for axis, x in enumerate(along_axes(*found, table.ndim - 1, float64_device(q.coords.device))):
            table = read_along(table, axis, x + (q.one_extent[axis] - 1), sample)
        return Table(table, first, second, prefix)
    check_reach(q, k)
    sizes, dtype = tuple(table.shape[1:]), table.dtype

    def made() -> Taps:
        middle = numbers([size - 1 for size in q.one_extent], q.coords.device)
        return taps(all_offsets(q, k, None) + middle, sizes, sample, dtype)

    bias = read(table, kept(q, k, ("pairs", sizes, sample, dtype), made)).transpose(0, 1)  # (B|1, H, Nq, Nk)
    return Dense(with_prefix(bias, q.prefix, k.prefix, prefix))


def check_reach(q: Positions, k: Positions) -> None:
    """Refuse offsets more than a patch beyond the table: both places may be half a patch outside."""
    refuse_spacing(q)
    refuse_spacing(k)
    here, there = q.bounds(), k.bounds()
    if here is None or there is None or not q.largest:
        return
    for axis, size in enumerate(q.largest):
        low, high = here.least[axis] - there.most[axis], here.most[axis] - there.least[axis]
        if not (low >= -size - 1e-3 and high <= size + 1e-3):
            raise ValueError(
                f"offsets along axis {axis} leave the table: it covers ±{size - 1} and a patch more at its border, got "
                f"{low:g} to {high:g}"
            )


def with_prefix(bias: Tensor, p: int, r: int, prefix: Tensor | None) -> Tensor:
    """(B|1, H, P + Nq, R + Nk): in front of places what pairs with prefix tokens get."""
    if prefix is None:
        return F.pad(bias, (r, 0, p, 0)) if p or r else bias
    samples, _, queries, keys = bias.shape
    above, left, corner = (
        prefix[:, i, None, None].expand(samples, -1, rows, columns)
        for i, rows, columns in ((0, p, keys), (1, queries, r), (2, p, r))
    )
    return torch.cat([torch.cat([corner, above], dim=3), torch.cat([left, bias], dim=3)], dim=2)
