"""How a grid is cut into windows, shifted or not: one index for tokens and places, and a mask from the places alone.

The grid is filled up to whole windows below and on the right, rolled by the shift, and partitioned. Rows and columns
are cut each by itself; tokens go where their places go, and two of a window may attend to each other if their places
really are neighbours, |p - q| < window on both axes, which those that a roll brought together are not.
(docs/decisions/0009)

Sources: Swin, arXiv 2103.14030, `models/swin_transformer.py`; torchvision, `shifted_window_attention` (fills up before
it rolls, and shifts an axis only if it has more than one window). How ours differs: no painting of regions and no
-100, which leaks once logits reach a few hundred; the mask is boolean, and there is one for each kind of window, not
one for each window of each image; filled-up places are masked unless told otherwise.

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
        area: N.
        order: (W, B, N) flattened: which token, of all B·T, stands where in the windows.
        back: (B, H·W) flattened: which place in the windows, of all W·B·N, each token went to.
        groups: (windows, mask) in order: how many windows have this mask, boolean (N, N) or (W·B, 1, N, N), True may
            attend; None where all may.
        zero_row: whether filled-up places hold a row of zeros behind the tokens, instead of being masked.
    """

    grid: Size
    area: int
    order: Tensor
    back: Tensor
    groups: tuple[tuple[int, Tensor | None], ...]
    zero_row: bool

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (W·B, N, D), the images of a window beside each other."""
        tokens = x.flatten(1, 2)
        if self.zero_row:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        return tokens.flatten(0, 1).index_select(0, self.order).unflatten(0, (-1, self.area))

    def join(self, y: Tensor, images: int) -> Tensor:
        """(W·B, N, D) -> (B, H, W, D): `split` undone, filled-up places dropped."""
        return y.flatten(0, 1).index_select(0, self.back).unflatten(0, (images, *self.grid))


def cut(grid: Size, window: Size, images: int, *, shifted: bool, masked: bool, device: torch.device) -> Windows:
    """The windows of a grid.

    Args:
        grid: (H, W) tokens; any size, smaller than the window too.
        window: (h, w).
        images: B.
        shifted: move the windows by half a window along each axis that has more than one.
        masked: whether places that the grid was filled up with are masked. Off, tokens of zeros stand there and are
            attended to, as in the original and in torchvision.
    """
    counts = -(-grid[0] // window[0]), -(-grid[1] // window[1])
    filled = counts[0] * window[0], counts[1] * window[1]
    shift = _shift(window[0], counts[0], shifted), _shift(window[1], counts[1], shifted)
    # Rows and columns are cut each by itself; windows, and who may attend in them, are all pairs of these.
    rows, columns = (_places(*axis, device) for axis in zip(counts, window, shift, strict=True))
    place = rows[:, None, :, None] * filled[1] + columns[None, :, None, :]  # (r, c, h, w) along the filled-up grid

    picked: list[tuple[Tensor, Tensor | None]]
    if torch.compiler.is_compiling():  # one group: how many windows are alike may not shape the graph
        near = (_near(*axis, masked) for axis in zip((rows, columns), window, grid, strict=True))
        mask = _both(*near).flatten(0, 1)[:, None]
        picked = [(place.flatten(2).flatten(0, 1), mask.repeat_interleave(images, 0))]
    else:
        picked = _by_kind(place, (rows, columns), window, shift, grid, masked and filled != grid)
    order = torch.cat([index for index, _ in picked]) if len(picked) > 1 else picked[0][0]  # (W, N)
    groups = tuple((index.shape[0], mask) for index, mask in picked)

    # Places count along the filled-up grid, tokens along the grid itself.
    tokens, area = math.prod(grid), math.prod(window)
    whole = not torch.compiler.is_compiling() and filled == grid  # a comparison may not shape the graph
    zero_row = not masked and not whole
    token = order
    if not whole:
        row, column = order // filled[1], order % filled[1]
        token = torch.where((row < grid[0]) & (column < grid[1]), row * grid[1] + column, tokens if zero_row else 0)
    per_image = torch.arange(images, device=device)[:, None]
    into = token[:, None] + (tokens + int(zero_row)) * per_image  # (W, B, N)
    where = torch.arange(order.shape[0], device=device)[:, None] * (images * area)
    where = where + torch.arange(area, device=device)  # (W, N) of the first image's tokens among W·B·N
    went = torch.empty_like(where).flatten().scatter(0, order.flatten(), where.flatten())
    if not whole:
        here = torch.arange(grid[0], device=device)[:, None] * filled[1] + torch.arange(grid[1], device=device)
        went = went[here.flatten()]
    back = went + area * per_image  # (B, H·W)
    return Windows(grid, area, into.flatten(), back.flatten(), groups, zero_row)


def _shift(side: int, count: int, shifted: bool) -> int:
    """Half a window, if there is more than one; without a branch, so that one exported program serves all sizes."""
    return side // 2 * torch.sym_min(1, count - 1) if shifted else 0  # type: ignore[return-value]


def _places(count: int, side: int, shift: int, device: torch.device) -> Tensor:
    """(windows, side): the places along an axis that each window holds, rolled by the shift."""
    places = torch.arange(count * side, device=device)
    if not isinstance(shift, int) or shift:  # 0 is known where nothing is traced
        places = (places + shift) % (count * side)
    return places.view(count, side)


def _near(places: Tensor, side: int, size: int, masked: bool) -> Tensor:
    """(windows, side) places -> (windows, side, side): neighbours, and no key that is not there.

    A place that is not there may attend to itself (and so to others of its row or column that are not there): no query
    is left with nothing, and what it gets is dropped.
    """
    near = (places[:, :, None] - places[:, None, :]).abs() < side
    if masked:
        near = near & ((places < size)[:, None, :] | torch.eye(side, dtype=torch.bool, device=places.device))
    return near


def _both(rows: Tensor, columns: Tensor) -> Tensor:
    """(r, h, h), (c, w, w) -> (r, c, h w, h w): what may attend along both axes."""
    near = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return near.flatten(4).flatten(2, 3)


def _by_kind(
    place: Tensor, axes: tuple[Tensor, Tensor], window: Size, shift: Size, grid: Size, masked: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Windows of one mask beside each other: [(index (W_i, N), mask (N, N) or None)]."""
    rows, columns = (
        _alike(len(places), side, moved, size if masked else places.numel())
        for places, side, moved, size in zip(axes, window, shift, grid, strict=True)
    )
    parts = [(row, column) for row in rows for column in columns]
    near: list[Tensor] = []
    if len(parts) > 1 or not (rows[0][2] and columns[0][2]):
        near = [_near(places, side, size, masked) for places, side, size in zip(axes, window, grid, strict=True)]
    found: list[tuple[Tensor, Tensor | None]] = []
    for (top, bottom, whole_rows), (left, right, whole_columns) in parts:
        ways = None if whole_rows and whole_columns else [near[0][top : top + 1], near[1][left : left + 1]]
        mask = None if ways is None else _both(*ways)[0, 0]
        found.append((place[top:bottom, left:right].flatten(2).flatten(0, 1), mask))
    return found


def _alike(count: int, side: int, shift: int, end: int) -> list[tuple[int, int, bool]]:
    """(first, last + 1, whole) of the windows along an axis: whole ones together, the others each by itself.

    A window is whole if it neither wraps around nor passes `end`. All are but the last, or the last two where the grid
    was filled up.
    """
    whole = max(0, (end - shift) // side)
    return [(0, whole, True)] * (whole > 0) + [(i, i + 1, False) for i in range(whole, count)]
