"""How a grid is cut into windows, shifted or not: one index for tokens and places, and a mask from the places alone.

The grid is filled up to whole windows below and on the right, rolled by the shift, and partitioned. Rows and columns
are cut each by itself; tokens go where their places go, and two of a window may attend to each other if their places
really are neighbours, |p - q| < window on both axes, which those that a roll brought together are not.
(docs/decisions/0009)

Sources: Swin, arXiv 2103.14030, `models/swin_transformer.py`; torchvision, `shifted_window_attention` (fills up before
it rolls, and shifts an axis only if it has more than one window). How ours differs: no painting of regions and no
-100, which leaks once logits reach a few hundred; the mask is boolean, and windows that need none, which are most,
go apart from those at the edges that do; filled-up places are masked by default.

Legend: B images, W windows, N = h w tokens of a window, D channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


class Windows(NamedTuple):
    """One way to cut a grid, for all images of a batch.

    Args:
        grid: (H, W) of the tokens, before filling up.
        window: (h, w).
        order: (W, B, N) flattened: which token, of all B·T, stands where in the windows. None where windows are
            neither shifted nor filled up: they are cut by views.
        back: (B, H·W) flattened: which place in the windows, of all W·B·N, each token went to.
        groups: (windows, masks) in order, one or two: how many windows, and a mask for each of each image, boolean
            (windows·B, 1, N, N), True may attend; None where all may.
        zero_row: whether filled-up places hold a row of zeros behind the tokens, instead of being masked.
    """

    grid: Size
    window: Size
    order: Tensor | None
    back: Tensor | None
    groups: tuple[tuple[int, Tensor | None], ...]
    zero_row: bool

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (W·B, N, D), the images of a window beside each other."""
        if self.order is None:
            cells = x.unflatten(2, (-1, self.window[1])).unflatten(1, (-1, self.window[0]))  # (B, r, h, c, w, D)
            windows: Tensor = cells.permute(1, 3, 0, 2, 4, 5).flatten(3, 4).flatten(0, 2)
            return windows
        tokens = x.flatten(1, 2)
        return self.pick(F.pad(tokens, (0, 0, 0, 1)) if self.zero_row else tokens, self.order)

    def pick(self, tokens: Tensor, order: Tensor) -> Tensor:
        """(B, T, D) -> (W·B, N, D), by the order; with `zero_row` the last token stands where none is."""
        chosen: Tensor = tokens.flatten(0, 1).index_select(0, order).unflatten(0, (-1, math.prod(self.window)))
        return chosen

    def join(self, y: Tensor, images: int) -> Tensor:
        """(W·B, N, D) -> (B, H, W, D): `split` undone, filled-up places dropped."""
        if self.back is None:
            counts = self.grid[0] // self.window[0], self.grid[1] // self.window[1]
            cells = y.unflatten(1, self.window).unflatten(0, (*counts, images))  # (r, c, B, h, w, D)
            x: Tensor = cells.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
        else:
            x = y.flatten(0, 1).index_select(0, self.back).unflatten(0, (images, *self.grid))
        return x


def cut(
    grid: Size,
    window: Size,
    images: int,
    *,
    shifted: bool,
    masked: bool,
    device: torch.device,
    rolled: Size | None = None,
) -> Windows:
    """The windows of a grid.

    Args:
        grid: (H, W) tokens; any size, smaller than the window too.
        window: (h, w).
        images: B.
        shifted: move the windows by half a window along each axis that has more than one.
        masked: whether places that the grid was filled up with are masked. Off, tokens of zeros stand there and are
            attended to, as in the original and in torchvision.
        rolled: with `shifted`, roll the grid by this much before it is filled up, whatever its size, as timm does; a
            last window that was filled up then mixes both edges. None: half a window along each axis that has more
            than one, after filling up.
    """
    # Rounded up without a negative number, which ONNX divides otherwise.
    counts = (grid[0] + window[0] - 1) // window[0], (grid[1] + window[1] - 1) // window[1]
    filled = counts[0] * window[0], counts[1] * window[1]
    shift = _shift(window[0], counts[0], shifted), _shift(window[1], counts[1], shifted)
    if rolled is not None:
        shift = rolled if shifted else (0, 0)
    whole = not torch.compiler.is_compiling() and filled == grid  # a comparison may not shape the graph
    if whole and not any(shift):
        return Windows(grid, window, None, None, ((math.prod(counts), None),), False)
    # Rows and columns are cut each by itself; windows, and who may attend in them, are all pairs of these.
    rows, columns = (_places(*axis, device) for axis in zip(counts, window, shift, strict=True))
    of_tokens = rows, columns
    # Where whole windows fill the grid, several along each axis that is shifted, both orders are one.
    if rolled is not None and not (whole and all(count > 1 or not by for count, by in zip(counts, shift, strict=True))):
        of_tokens = _rolled(rows, shift[0], grid[0]), _rolled(columns, shift[1], grid[1])
        rows, columns = _parted(rows, shift[0]), _parted(columns, shift[1])
    place = of_tokens[0].view(-1, 1, window[0], 1) * filled[1] + of_tokens[1].view(1, -1, 1, window[1])
    place = place.flatten(2)  # (r, c, N) along the filled-up grid

    groups: list[tuple[int, Tensor | None]]
    if torch.compiler.is_compiling():  # one group: how many windows are alike may not shape the graph
        near = (_near(*axis, masked) for axis in zip((rows, columns), window, grid, strict=True))
        order = place.flatten(0, 1)  # (W, N)
        mask = _both(*near).flatten(0, 1)[:, None, None]  # (W, 1, 1, N, N)
        groups = [(order.shape[0], mask.expand(-1, images, -1, -1, -1).flatten(0, 1))]
    else:
        kinds = _by_kind(place, (rows, columns), window, shift, grid, masked and filled != grid)
        order = torch.cat([index for index, _ in kinds])
        groups = [(len(index), None) for index, mask in kinds if mask is None]
        masks = [mask.expand(len(index) * images, 1, -1, -1) for index, mask in kinds if mask is not None]
        if masks:
            groups.append((len(order) - sum(count for count, _ in groups), torch.cat(masks)))

    # Places count along the filled-up grid, tokens along the grid itself.
    tokens, area = math.prod(grid), math.prod(window)
    zero_row = not masked and not whole
    token = order
    if not whole:
        row, column = (torch.arange(size, device=device) for size in filled)
        here = (row < grid[0])[:, None] & (column < grid[1])
        token = torch.where(here, row[:, None] * grid[1] + column, tokens if zero_row else 0).flatten()[order]
    per_image = torch.arange(images, device=device)[:, None]
    into = token[:, None] + (tokens + int(zero_row)) * per_image  # (W, B, N)
    where = torch.arange(order.shape[0], device=device).unsqueeze(1) * (images * area)
    where = where + torch.arange(area, device=device)  # (W, N) of the first image's tokens among W·B·N
    went = torch.empty_like(where).flatten().scatter(0, order.flatten(), where.flatten())
    if not whole:
        here = torch.arange(grid[0], device=device)[:, None] * filled[1] + torch.arange(grid[1], device=device)
        went = went[here.flatten()]
    back = went + area * per_image  # (B, H·W)
    return Windows(grid, window, into.flatten(), back.flatten(), tuple(groups), zero_row)


def _shift(side: int, count: int, shifted: bool) -> int:
    """Half a window, if there is more than one; without a branch, so that one exported program serves all sizes."""
    if not shifted:
        return 0
    least = min if isinstance(count, int) else torch.sym_min  # which torch 2.11 cannot trace with plain numbers
    return side // 2 * least(1, count - 1)


def _places(count: int, side: int, shift: int, device: torch.device) -> Tensor:
    """(windows, side): the places along an axis that each window holds, rolled by the shift."""
    places = torch.arange(count * side, device=device)
    if not isinstance(shift, int) or shift:  # a plain 0 where nothing is traced
        places = places + shift
        places = torch.where(places < count * side, places, places - count * side)
    return places.view(count, side)


def _rolled(places: Tensor, shift: int, size: int) -> Tensor:
    """(windows, side) places of an axis that is rolled by the shift first, and filled up afterwards."""
    index = torch.arange(places.numel(), device=places.device).view_as(places)
    length = index.new_full((), size)  # a tensor: ONNX has no remainder by a free number
    return torch.where(index < size, torch.remainder(index + shift, length), index)


def _parted(places: Tensor, shift: int) -> Tensor:
    """(windows, side) places, those that the roll brought to the end far from all others, in a single window too."""
    index = torch.arange(places.numel(), device=places.device).view_as(places)
    return torch.where(index < places.numel() - shift, places, places - 2 * places.numel())


def _near(places: Tensor, side: int, size: int, masked: bool) -> Tensor:
    """(windows, side) places -> (windows, side, side): neighbours, and no key that is not there.

    A place that is not there may attend to itself (and so to others of its row or column that are not there): no query
    is left with nothing, and what it gets is dropped.
    """
    near = (places.unsqueeze(2) - places.unsqueeze(1)).abs() < side
    if masked:
        near = near & ((places < size)[:, None, :] | torch.eye(side, dtype=torch.bool, device=places.device))
    return near


def _both(rows: Tensor, columns: Tensor) -> Tensor:
    """(r, h, h), (c, w, w) -> (r, c, h w, h w): True where attention is allowed along both axes."""
    h, w = rows.shape[-1], columns.shape[-1]
    return (rows.view(-1, 1, h, 1, h, 1) & columns.view(1, -1, 1, w, 1, w)).flatten(4).flatten(2, 3)


def _by_kind(
    place: Tensor, axes: tuple[Tensor, Tensor], window: Size, shift: Size, grid: Size, masked: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Windows of one mask beside each other, those without any first: [(index (W_i, N), mask (N, N) or None)]."""
    kinds = [
        _alike(len(places), side, moved, size if masked else places.numel())
        for places, side, moved, size in zip(axes, window, shift, grid, strict=True)
    ]
    parts = [(row, column) for row in kinds[0] for column in kinds[1]]
    masks: tuple[Tensor | None, ...] = (None,)
    if len(parts) > 1 or not all(whole for _, _, whole in parts[0]):
        # The last windows along an axis are one of each kind.
        last = (places[-len(of_axis) :] for places, of_axis in zip(axes, kinds, strict=True))
        masks = _both(*(_near(*axis, masked) for axis in zip(last, window, grid, strict=True))).flatten(0, 1).unbind()
    return [
        (place[top:bottom, left:right].flatten(0, 1), None if row_whole and column_whole else mask)
        for ((top, bottom, row_whole), (left, right, column_whole)), mask in zip(parts, masks, strict=True)
    ]


def _alike(count: int, side: int, shift: int, end: int) -> list[tuple[int, int, bool]]:
    """(first, last + 1, whole) of the windows along an axis: whole ones together, the others each by itself.

    A window is whole if it neither wraps around nor passes `end`. All are but the last, or the last two where the grid
    was filled up.
    """
    whole = max(0, (end - shift) // side)
    return [(0, whole, True)] * (whole > 0) + [(i, i + 1, False) for i in range(whole, count)]
