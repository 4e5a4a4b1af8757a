"""Tables at places of grids of several sizes: what the table, resized to each place's own grid, holds there.

Resizing is a product of kernels along the axes, and so is reading: along an axis of T entries, resized to S, a whole
place p has

    plain        the entries around u = (p + 1/2) T / S - 1/2, by Keys' kernel with a = -3/4
    bilinear     the two around u, linearly;    dino: as plain, S + 0.1 for S;    corners: u = p (T - 1) / (S - 1)
    geometric    the two stretched offsets around p - (S - 1) / 2, linearly
    antialias    Σ_j w((j + 1/2 - c) / r) table[j] / Σ_j w(...), c = (p + 1/2) T / S, r = max(1, T / S), Keys' kernel
                 with a = -1/2;    smooth: likewise, w(x) = max(0, 1 - |x|)

Sources: torch, `aten/src/ATen/native/UpSample.h` and `cpu/UpSampleKernel.cpp`, whose `interpolate` resizes a table for
all (`tables.RESIZES`): this is that, place by place. Sizes are tensors here and no value of them is read, so that a
batch of any sizes is one graph and no device waits. Between whole places entries of the resized table are read, by
`sample` (`between.py`), as of one that was resized. Nor is looked where places are: outside of their grid they have its
outermost entries.

Legend: C channels (width, or heads), T entries along an axis of the table, S size of a grid, d axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..positions import Positions, exact
from .base import Policy
from .between import Taps, joined, neighbours, read, refuse_spacing
from .mlp import lifted

Weights = Taps | Tensor  # of the neighbours in a flat table, or of all its entries (..., T_1 ... T_d)


class Fit(NamedTuple):
    """How a table meets the grids of some places.

    Args:
        mode: a word of `tables.RESIZES`.
        sizes: (..., d) float64, those that the table is resized to; of these the middle is kept, or ends are repeated.
        grid: (..., d) float64, sizes of their grids.
        sample: how places between whole ones are read, a word of `between.SAMPLES`; "" where there are none.
    """

    mode: str
    sizes: Tensor
    grid: Tensor
    sample: str = ""


def fit_of(policy: Policy | None, own: str, grid: Tensor, old: tuple[int, ...], sample: str = "", axis: int = 0) -> Fit:
    """How a table of these sizes meets grids (..., d): in its own way, or in that of a policy; see `tables.fitted`."""
    return Fit(*((own, grid) if policy is None else policy.resized_to(grid, old, own, axis)), grid, sample)


def tokens_by_sample(
    policy: Policy | None, table: Tensor, at: Positions, own: str, sample: str, axis: int = 0
) -> Tensor:
    """(B, N, D) of a table (D, *old) over the axes of places from `axis` on, resized to the grid of each sample."""
    refuse_spacing(at)
    old, axes, wide = tuple(table.shape[1:]), slice(axis, axis + table.ndim - 1), lifted(table)
    sizes = at.sizes(prefix=False)[..., axes]
    fit = fit_of(policy, own, sizes, old, "" if at.on_integers() else sample, axis)
    weights = weights_of(exact(at.coords)[..., axes], old, fit, wide.dtype, len(wide))
    return read_weighted(wide, weights).to(table.dtype).movedim(0, -1)


def weights_of(x: Tensor, old: tuple[int, ...], fit: Fit, dtype: torch.dtype, channels: int = 1) -> Weights:
    """The weights of the entries of a table (C, *old) at places x (..., d), float64, each of its own grid.

    Of all entries where a filter reaches over more of them than can be known without a look at the sizes, and where
    they are no more numbers than what is read: one product is faster than a look-up for each neighbour.
    """
    if fit.mode not in FILTERS and prod(old) > channels:
        return joined([_neighbours(x, fit, axis, old) for axis in range(len(old))], old, dtype)
    every = [line_of(x, fit, axis, old).to(dtype) for axis in range(len(old))]
    return reduce(lambda a, b: (a[..., None] * b[..., None, :]).flatten(-2), every)


def line_of(x: Tensor, fit: Fit, axis: int, old: tuple[int, ...]) -> Tensor:
    """(..., T) float64 weights of all entries along one axis, at x (..., d)."""
    if fit.mode not in FILTERS:
        return spread(_neighbours(x, fit, axis, old), old[axis])
    kernel = FILTERS[fit.mode]
    filtered = (_filtered(p, fit.sizes[..., axis], old[axis], kernel) * w[..., None] for p, w in _rows(x, fit, axis))
    return reduce(torch.add, filtered)


def spread(taps: Taps, size: int) -> Tensor:
    """(..., T) weights of all entries along an axis from those of the neighbours (...)."""
    weights = torch.stack([w for _, w in taps], dim=-1)
    index = torch.stack([i for i, _ in taps], dim=-1).expand(weights.shape)
    return weights.new_zeros(*weights.shape[:-1], size).scatter_add(-1, index, weights)


def read_weighted(table: Tensor, weights: Weights) -> Tensor:
    """A table (C, *sizes) at places of which these are the weights -> (C, ...)."""
    if not isinstance(weights, Tensor):
        return read(table, weights)
    dtype = torch.float64 if table.is_cuda else table.dtype  # where TF32 is allowed, a product has 11 bits
    found = weights.to(table.device, dtype) @ table.to(dtype).flatten(1).t()
    return found.movedim(-1, 0).to(table.dtype)


def _neighbours(x: Tensor, fit: Fit, axis: int, old: tuple[int, ...]) -> Taps:
    """Along one axis; weights float64."""
    new, (place, kind) = fit.sizes[..., axis], SOURCES[fit.mode]
    if fit.mode == "dino":
        kept = reduce(torch.logical_and, (fit.sizes[..., a] == n for a, n in enumerate(old)))
        new = torch.where(kept, new, new + 0.1)
    found = []
    for p, share in _rows(x, fit, axis):
        found += [(i, w * share) for i, w in neighbours(place(p, new, old[axis]), old[axis], kind)]
    return found


def _rows(x: Tensor, fit: Fit, axis: int) -> Taps:
    """The whole places of the resized table that places of a grid read along an axis, float64, and how much of each."""
    x = x[..., axis]
    rows = [(x, torch.ones_like(x))] if not fit.sample else neighbours(x, None, fit.sample)
    grid, sizes = fit.grid[..., axis], fit.sizes[..., axis]
    first = ((grid - sizes) / 2).floor()
    return [
        ((i.to(x.dtype).clamp(min=0).minimum(grid - 1) - first).clamp(min=0).minimum(sizes - 1), w) for i, w in rows
    ]


def _centred(p: Tensor, size: Tensor, old: int) -> Tensor:
    return (p + 0.5) * (old / size) - 0.5


def _cornered(p: Tensor, size: Tensor, old: int) -> Tensor:
    return p * ((old - 1) / (size - 1).clamp(min=1))


def _stretched(p: Tensor, size: Tensor, old: int) -> Tensor:
    """See `tables.resize_geometric`: q is found by as many halvings, for all sizes at once."""
    count, reach = old // 2, (size / 2).floor()
    low, high = torch.full_like(size, 1.01), torch.full_like(size, 1.5)
    q = high
    for _ in range(19):  # until the two are within 1e-6
        q = (low + high) / 2
        far = (1 - q**count) / (1 - q) > reach
        low, high = torch.where(far, low, q), torch.where(far, q, high)
    ends = (q[..., None] ** torch.arange(count, dtype=q.dtype, device=q.device)).cumsum(-1)
    x = p - (size - 1) / 2
    if old == 1:
        return torch.zeros_like(x)
    knots = torch.cat([-ends.flip(-1), torch.zeros_like(q)[..., None], ends], dim=-1).expand(*x.shape, old)  # rising
    right = (knots < x[..., None]).sum(-1, keepdim=True).clamp(1, old - 1)
    before, behind = knots.gather(-1, right - 1)[..., 0], knots.gather(-1, right)[..., 0]
    found = right[..., 0] - 1 + ((x - before) / (behind - before)).clamp(0, 1)
    return torch.where(size == old, p, found)


def _filtered(p: Tensor, size: Tensor, old: int, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    ratio = old / size
    entries = torch.arange(old, dtype=p.dtype, device=p.device) + 0.5
    weights = kernel((entries - ((p + 0.5) * ratio)[..., None]).abs() / ratio.clamp(min=1)[..., None])
    return weights / weights.sum(-1, keepdim=True)


def _keys(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, of magnitudes."""
    x = x.clamp(max=2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)


# Where in the table a whole place of a resized one lies, and how it is read there.
SOURCES: dict[str, tuple[Callable[[Tensor, Tensor, int], Tensor], str]] = {
    "plain": (_centred, "bicubic"),
    "bilinear": (_centred, "bilinear"),
    "dino": (_centred, "bicubic"),
    "corners": (_cornered, "bilinear"),
    "geometric": (_stretched, "bilinear"),
}
# The kernels that grow where a table shrinks.
FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"antialias": _keys, "smooth": _triangle}
