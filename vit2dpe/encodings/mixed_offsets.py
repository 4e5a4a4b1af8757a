"""Biases of a table over offsets on grids of several sizes: of each sample those that its grid alone would have.

Where the largest sizes are known (`Positions.largest`), every sample has a table of all offsets of a grid as large,
made along one axis after the other from the weights of `mixed.py`, (B, 2 M - 1, T), and looked up for each pair. Else,
and in a row of images, the table of training is read for each pair of places.

Legend: B samples, H heads, N tokens that have a place, T entries along an axis of the table, M largest size, S size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..positions import Positions, exact
from ..signal import Table
from .base import Policy
from .between import neighbours
from .mixed import Weights, fit_of, line_of, read_weighted, spread, weights_of
from .offsets import all_offsets, check_reach, kept
from .tables import check_extents

Line = Callable[[Tensor, int], Tensor]  # offsets (O,) and an axis -> weights (B, O, T), float64


def resized_by_sample(
    policy: Policy | None, table: Tensor, q: Positions, k: Positions, own: str, sample: str, mirrored: bool
) -> Tensor:
    """(B, H, Nq, Nk) of a table (H, *old) over offsets, at each sample's own size.

    Args:
        own, sample: how it is resized and, between whole offsets, read.
        mirrored: the sign of an offset counts along no axis.
    """
    old, dtype = tuple(table.shape[1:]), table.dtype
    check_extents(q, k, len(old))
    whole = q.on_integers() and k.on_integers()
    if not whole:
        check_reach(q, k)
    key = ("resized by sample", policy, own, sample, old, dtype, mirrored)

    def along(x: Tensor, axis: int) -> Tensor:
        sizes = q.sizes(prefix=False)  # (B, 1, d)
        x = (x.abs() if mirrored else x)[:, None] + (sizes - 1)  # (B, O, d)
        return line_of(x, fit_of(policy, own, 2 * sizes - 1, old), axis, old)

    if whole and _tabled(q, k):
        return _looked_up(table, q, k, key, along)

    def made() -> Weights:
        sizes = q.sizes(prefix=False)[..., None, :]  # (B, N|1, 1, d)
        away = all_offsets(q, k, None)  # (B, Nq, Nk, d)
        fit = fit_of(policy, own, 2 * sizes - 1, old, "" if whole else sample)
        return weights_of((away.abs() if mirrored else away) + (sizes - 1), old, fit, dtype, len(table))

    return read_weighted(table, kept(q, k, key, made)).transpose(0, 1)


def scaled_by_sample(table: Tensor, q: Positions, k: Positions, sample: str) -> Tensor | None:
    """(B, H, Nq, Nk) at places that a policy scaled into the grid of the table (H, *old), each sample by its own ratio;
    None for others, and where they are to be read pair by pair."""
    if q.source is None or k.source is None or not (q.by_sample() and k.by_sample()):
        return None
    (first, ratio), (second, _) = q.source, k.source
    if not (first.on_integers() and second.on_integers() and _tabled(first, second)):
        return None
    old = tuple(table.shape[1:])

    def along(x: Tensor, axis: int) -> Tensor:
        return spread(neighbours(x * ratio[..., axis] + (old[axis] - 1) / 2, old[axis], sample), old[axis])

    return _looked_up(table, first, second, ("scaled by sample", sample, old, table.dtype, ratio), along)


def _tabled(q: Positions, k: Positions) -> bool:
    """Whether tables of all offsets are smaller than what is looked up in them."""
    offsets = math.prod([2 * size - 1 for size in q.largest])
    return bool(q.largest) and q.segment is None and offsets <= q.coords.shape[1] * k.coords.shape[1]


def _looked_up(table: Tensor, q: Positions, k: Positions, key: tuple[Hashable, ...], along: Line) -> Tensor:
    def lines() -> list[Tensor]:
        device = exact(q.coords[:0]).device
        steps = [torch.arange(1 - size, size, dtype=torch.float64, device=device) for size in q.largest]
        return [along(x, axis) for axis, x in enumerate(steps)]

    own = _own_tables(table, kept(q, k, key, lines))  # (B, H, 2 M_1 - 1, ...)

    def made() -> Tensor:
        of_q, of_k = Table(own[0], q, k).linear()
        pairs: Tensor = of_q[:, :, None] - of_k[:, None, :]
        return pairs

    index = kept(q, k, ("offsets by sample", own.shape[2:]), made)  # (B, Nq, Nk)
    batch = max(len(index), len(own))
    flat = index.flatten(1)[:, None].expand(batch, own.shape[1], -1)
    found: Tensor = own.flatten(2).expand(batch, -1, -1).gather(2, flat).unflatten(2, index.shape[1:])
    return found


def _own_tables(table: Tensor, lines: list[Tensor]) -> Tensor:
    """(H, T_1, ...) -> (B, H, O_1, ...), along each axis by weights (B, O, T)."""
    dtype = torch.float64 if table.is_cuda else table.dtype  # where TF32 is allowed, a product has 11 bits
    own = table.to(dtype)[None]
    for axis, weights in enumerate(lines, start=2):
        moved = own.movedim(axis, -1)
        found = moved.flatten(1, -2) @ weights.to(own.device, dtype).mT  # (B, H ..., O)
        own = found.unflatten(1, moved.shape[1:-1]).movedim(-1, axis)
    return own.to(table.dtype)
