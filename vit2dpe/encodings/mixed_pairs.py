"""Contextual biases on grids of several sizes: which vectors each pair of places reads.

On one grid a table of all offsets holds it (`vit2dpe/contextual.py`). Such a table is as large as the grid, and no size
is looked at where each sample has its own. Here entries and weights are of pairs, (B|1, Nq, Nk), the same for all heads
and blocks; products with queries stay N x E.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..contextual import Pairs, ReadPairs
from ..positions import Positions, exact
from .base import Policy
from .mixed import Weights, fit_of, weights_of
from .offsets import kept
from .tables import check_extents


def entries_of_pairs(key: tuple[Hashable, ...], entry: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> ReadPairs:
    """Of a table of these sizes that serves every grid as it is: an entry along each axis for each offset.

    Args:
        key: what `entry` depends on.
    """

    def made(q: Positions, k: Positions) -> Tensor:
        index = torch.zeros((), dtype=torch.int64, device=q.coords.device)
        for away, size in zip(_apart(q, k), sizes, strict=True):
            index = index * size + entry(away)
        return index

    def read(q: Positions, k: Positions) -> Pairs:
        check_extents(q, k, len(sizes))
        return [[(kept(q, k, ("entries of pairs", *key), lambda: made(q, k)), None)]]

    return read


def resized_for_pairs(policy: Policy | None, tables: Sequence[Tensor]) -> ReadPairs:
    """Of a table (1, T_a, Dh) over the offsets along each axis what it has, resized to each sample's own grid."""
    counts = tuple(table.shape[1] for table in tables)

    def made(q: Positions, k: Positions) -> list[Weights]:
        found, all_sizes = list[Weights](), q.sizes(prefix=False)[..., None, :]  # (B|1, N|1, 1, d)
        for axis, (away, count) in enumerate(zip(_apart(q, k), counts, strict=True)):
            sizes = all_sizes[..., axis : axis + 1]
            fit = fit_of(policy, "bilinear", 2 * sizes - 1, (count,), axis=axis)
            x = exact(away)[..., None] + (sizes - 1)  # (B, Nq, Nk, 1)
            found.append(weights_of(x, (count,), fit, tables[axis].dtype))
        return found

    def read(q: Positions, k: Positions) -> Pairs:
        check_extents(q, k, len(tables))
        return kept(q, k, ("resized for pairs", policy, counts, tables[0].dtype), lambda: made(q, k))

    return read


def _apart(q: Positions, k: Positions) -> list[Tensor]:
    """(B|1, Nq, Nk) offsets along each axis, whole numbers."""
    of_q, of_k = q.places().unbind(-1), k.places().unbind(-1)
    return [x[:, :, None] - y[:, None, :] for x, y in zip(of_q, of_k, strict=True)]
