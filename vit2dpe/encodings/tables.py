"""Tables over a grid: looking places up in them, the offsets they cover, and resizing them to another grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..positions import Positions, float64_device, is_tracing, numbers
from ..signal import Distance, Table
from .base import PositionEncoding


def channels_first(x: Tensor) -> Tensor:
    """(..., C) -> (C, ...), by an operation that converters of traced graphs have."""
    return x.permute(-1, *range(x.ndim - 1))


def replace(parameter: Tensor, value: Tensor) -> None:
    """Other values for a parameter, of another shape too; it stays the object that an optimizer was given.

    A gradient of another shape is dropped. What an optimizer keeps for a parameter (moments) has the old shape: torch
    refuses its next step.
    """
    if value.shape != parameter.shape:
        parameter.grad = None
    parameter.data = value


def resize(
    table: Tensor,
    sizes: tuple[int, ...],
    *,
    mode: str = "bicubic",
    antialias: bool = True,
    offset: float = 0.0,
    corners: bool = False,
) -> Tensor:
    """Resize the last d dimensions of `table` (C, *old) to `sizes`, in float32 at least.

    Both bicubic and bilinear kernels are products of kernels along the axes, so the axes are done one after the other:
    the same for a line, an image and a volume. An axis that keeps its size keeps its bits. `size=` is given, not a
    scale factor, whose rounding is off by one at some sizes; but with an `offset` the samples are those of the factor
    (size + offset) / old, which is how DINO's tables were resized. With `corners` the outermost places, not the outer
    edges, stay where they are (`align_corners`). While compiling no axis is skipped: resizing to the
    same size changes no bit, and a branch on the size would be a graph for each.
    """
    if (offset or not torch.compiler.is_compiling()) and tuple(table.shape[1:]) == tuple(sizes):
        return table
    dtype = table.dtype
    wide = table.float() if dtype.itemsize < 4 else table
    for axis, size in enumerate(sizes, start=1):
        if not offset and not torch.compiler.is_compiling() and wide.shape[axis] == size:
            continue
        moved = wide.transpose(axis, -1)  # (..., old): the last axis, because with one of 1 torch resizes wrongly
        image = moved.reshape(1, 1, -1, moved.shape[-1])
        if offset:
            scaled = partial(F.interpolate, scale_factor=(1.0, (size + offset) / image.shape[-1]), mode=mode)
            # torch's backward is a copy where sizes are equal, whatever the factor.
            copied = size == image.shape[-1] and image.requires_grad and torch.is_grad_enabled()
            image = image @ scaled(torch.eye(size).to(image)[None, None]) if copied else scaled(image)
        else:
            image = _resize_last(image, size, mode, antialias, corners)
        wide = image.reshape(*moved.shape[:-1], size).transpose(axis, -1)
    return wide.to(dtype)


# In torch 2.8 every compiled graph reads True from `is_exporting`.
_EXPORTS_ARE_KNOWN = torch.__version__ >= "2.11"


def _resize_last(image: Tensor, size: int, mode: str, antialias: bool, corners: bool) -> Tensor:
    """`F.interpolate` of the last axis.

    torch cannot compile the backward pass of bicubic with antialias to a size that is free. Gradients then flow through
    a product with the matrix of the kernel, which is the identity resized.
    """
    old = image.shape[-1]
    if _EXPORTS_ARE_KNOWN:
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    else:
        compiled = torch.compiler.is_dynamo_compiling()
    if not (compiled and torch.is_grad_enabled() and image.requires_grad and antialias and mode == "bicubic"):
        return F.interpolate(image, (image.shape[-2], size), mode=mode, antialias=antialias, align_corners=corners)
    with torch.autocast(image.device.type, enabled=False):
        one = torch.eye(old, dtype=image.dtype, device=image.device)[None, None]
        return image @ F.interpolate(one, (old, size), mode=mode, antialias=antialias, align_corners=False)


def resize_geometric(table: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Resize a table over offsets (H, 2 S_1 - 1, ...): near offsets keep their entries, far ones are stretched.

    Along each axis the old entries are put at 0, ±1, ±(1 + q), ±(1 + q + q²), ..., with q so that the last one lies
    where the new table ends, and read linearly at the new offsets. Source: BEiT, `interpolate_relative_position_bias`,
    in timm's form (`resize_rel_pos_bias_table`; linear where BEiT is cubic).
    """
    wide = table.float() if table.dtype.itemsize < 4 else table
    for axis, size in enumerate(sizes, start=1):
        old = wide.shape[axis]
        if old == size:
            continue
        at = _geometric_places(old // 2, size // 2, wide)  # (old,), rising, symmetric
        new = torch.arange(size, dtype=wide.dtype, device=wide.device) - (size - 1) / 2
        right = torch.searchsorted(at, new).clamp(1, max(1, old - 1))
        if old == 1:
            wide = wide.index_select(axis, torch.zeros_like(right))
            continue
        share = ((new - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)  # beyond the ends: the last entry
        share = share.view(-1, *[1] * (wide.ndim - axis - 1))
        wide = wide.index_select(axis, right - 1) * (1 - share) + wide.index_select(axis, right) * share
    return wide.to(table.dtype)


def _geometric_places(count: int, reach: int, like: Tensor) -> Tensor:
    """0 and ± the partial sums of 1, q, q², ..., `count` of them, q by bisection in (1.01, 1.5) as the sources do."""
    low, high, q = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**count) / (1 - q) > reach else (q, high)
    sums, total = [], 1.0
    for i in range(count):
        sums.append(total)
        total += q ** (i + 1)
    return numbers([-s for s in reversed(sums)] + [0.0] + sums, like.device).to(like.device, like.dtype)


# How a table (C, *old) meets other sizes. geometric: tables over offsets alone.
RESIZES: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "antialias": resize,
    "plain": partial(resize, antialias=False),
    "bilinear": partial(resize, mode="bilinear", antialias=False),
    "smooth": partial(resize, mode="bilinear"),
    "corners": partial(resize, mode="bilinear", antialias=False, corners=True),
    "dino": partial(resize, antialias=False, offset=0.1),
    "geometric": resize_geometric,
}


def fitted(encoding: PositionEncoding, table: Tensor, sizes: tuple[int, ...], own: str, axis: int = 0) -> Tensor:
    """The table (C, *old) of an encoding at other sizes: resized in its own way, or in that of the policy that holds.

    Args:
        own: a word of `RESIZES`.
        axis: of the grid, the first one of the table.
    """
    policy = encoding.policy
    return RESIZES[own](table, sizes) if policy is None else policy.resize(table, sizes, own, axis)


def check_places(at: Positions) -> Tensor:
    """(B|1, N, d) whole coordinates inside the extent; others are an error wherever they can be looked at."""
    places = at.places()
    bounds, sizes = None if at.on_grid else at.bounds(), at.one_extent
    if bounds is not None and (
        min(bounds.least) < 0 or any(most >= size for most, size in zip(bounds.most, sizes, strict=True))
    ):
        raise ValueError(
            f"places from {list(map(round, bounds.least))} to {list(map(round, bounds.most))} leave the grid of "
            f"{sizes}, which this table covers"
        )
    return places


def flat_index(at: Positions) -> Tensor:
    """(B|1, N) row-major index of each place in its grid."""
    places = check_places(at)
    index = places[..., 0]
    for axis in range(1, at.axes):
        index = index * at.one_extent[axis] + places[..., axis]
    return index


def check_extents(q: Positions, k: Positions, axes: int) -> None:
    """Queries and keys of a bias over offsets live on one grid, of the axes it was built for.

    Extents by sample are not looked at, what is known of the largest is.
    """
    if isinstance(q.extent, Tensor) != isinstance(k.extent, Tensor) or q.largest != k.largest:
        raise ValueError(f"queries and keys must live on one grid, got extents {q.extent} and {k.extent}")
    if q.axes != axes:
        raise ValueError(f"this bias was built for {axes} axes, the positions have {q.axes}")


def axis_offsets(q: Positions, k: Positions, axes: int, device: torch.device) -> list[Tensor]:
    """For each axis, the offsets q - k that the extent, or the largest of them, allows: -(S - 1) to S - 1, int64."""
    check_extents(q, k, axes)
    if not q.largest:
        raise ValueError(
            "a table of offsets is as large as the largest grid, which these places of grids by sample do not name: "
            "give Positions a box, or make them by Positions.grids"
        )
    return [torch.arange(1 - size, size, device=device) for size in q.largest]


def viewed(view: Tensor) -> Tensor:
    """A view of a parameter, for a Signal: made while gradients are off it still claims to require one, and torch's
    trackers of modules (FlopCounterMode) fail at such an output. A traced graph is the same with and without."""
    return view if torch.is_grad_enabled() or is_tracing() else view.detach()


def flat_entries(along: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """(n_1, ..., n_d) row-major entry of a table of these sizes, from the index along each axis, (n_a,) int64."""
    entries = along[0]
    for index, size in zip(along[1:], sizes[1:], strict=True):
        entries = entries[..., None] * size + index
    return entries


def offset_grid(q: Positions, k: Positions, axes: int) -> Tensor:
    """(2 S_1 - 1, ..., 2 S_d - 1, d) all offsets q - k of the extent, float64, on the `float64_device`."""
    along = [offset.double() for offset in axis_offsets(q, k, axes, float64_device(q.coords.device))]
    return torch.stack(torch.meshgrid(*along, indexing="ij"), dim=-1)


def looked_up(term: Distance) -> Distance | Table:
    """A penalty whose slopes are learned as a table over offsets, where all places are known to be whole.

    It is computed for each offset then and not for each pair, and what serves tables serves it, in training too.
    """
    q, k = term.q, term.k
    if not (q.on_grid and k.on_grid and q.largest and q.largest == k.largest):
        return term
    at, origin = q.memoize(("offsets as places", q.largest), lambda: _as_places(q, k))  # the same for all blocks
    formula = Distance(at, origin, term.slopes, dtype=term.dtype, kind=term.kind, bend=term.bend, rate=term.rate)
    table = formula.dense()[0, :, :, 0]  # (H, Π (2 S - 1))
    return Table(table.unflatten(1, tuple(2 * size - 1 for size in q.largest)), q, k)


def _as_places(q: Positions, k: Positions) -> tuple[Positions, Positions]:
    """All offsets of the extent, and what they are measured from."""
    offsets = offset_grid(q, k, q.axes).flatten(0, -2)[None].to(q.coords.device, torch.float32)
    return Positions(offsets, q.largest), Positions(offsets.new_zeros(1, 1, q.axes), q.largest)
