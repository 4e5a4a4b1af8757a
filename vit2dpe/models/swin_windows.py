"""How a grid is cut into windows, shifted or not: one index for tokens and places, and a mask from the places alone.

The grid is filled up to whole windows below and on the right, rolled by the shift, and partitioned. The same order is
taken of the tokens and of their `Positions`; two tokens of a window may attend to each other if they really are
neighbours, |p - q| < window on both axes, which those that a roll brought together are not.

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
from einops import rearrange
from torch import Tensor

from ..kernels.gather import permute_rows
from ..positions import Positions

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
        whole: whether nothing was filled up, so that `order` and `back` undo each other.
    """

    grid: Size
    area: int
    order: Tensor
    back: Tensor
    groups: tuple[tuple[int, Tensor | None], ...]
    zero_row: bool
    whole: bool

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (W·B, N, D), the images of a window beside each other."""
        tokens = x.flatten(1, 2)
        if self.zero_row:
            tokens = F.pad(tokens, (0, 0, 0, 1))
        rows = tokens.flatten(0, 1)
        rows = permute_rows(rows, self.order, self.back) if self.whole else rows.index_select(0, self.order)
        return rows.unflatten(0, (-1, self.area))

    def join(self, y: Tensor, images: int) -> Tensor:
        """(W·B, N, D) -> (B, H, W, D): `split` undone, filled-up places dropped."""
        rows = y.flatten(0, 1)
        rows = permute_rows(rows, self.back, self.order) if self.whole else rows.index_select(0, self.back)
        return rows.unflatten(0, (images, *self.grid))


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
    rolled = torch.arange(math.prod(filled), device=device).view(filled).roll([-shift[0], -shift[1]], (0, 1))
    order = rearrange(rolled, "(r h) (c w) -> r c (h w)", h=window[0], w=window[1])
    # Whatever is done to tokens is done to Positions: the places of the tokens in each window.
    places = Positions.grid(filled, device).take(order.flatten()).coords.view(*order.shape, 2)  # (r, c, N, 2)
    real = (places[..., 0] < grid[0]) & (places[..., 1] < grid[1])

    picked: list[tuple[Tensor, Tensor | None]]
    if torch.compiler.is_compiling():  # one group: how many windows are alike may not shape the graph
        mask = _may_attend(places, real, window, masked).flatten(0, 1)[:, None]
        picked = [(order.flatten(0, 1), mask.repeat_interleave(images, 0))]
    else:
        picked = _by_kind(order, places, real, grid if masked else filled, window, shift, masked)
    order = torch.cat([index for index, _ in picked])  # (W, N) places of the filled-up grid
    groups = tuple((index.shape[0], mask) for index, mask in picked)

    # Places count along the filled-up grid, tokens along the grid itself.
    row, column = order // filled[1], order % filled[1]
    inside = (row < grid[0]) & (column < grid[1])
    tokens = math.prod(grid)
    whole = not torch.compiler.is_compiling() and filled == grid  # a comparison may not shape the graph
    zero_row = not masked and not whole
    nowhere = tokens if zero_row else 0
    per_image = torch.arange(images, device=device)
    token = torch.where(inside, row * grid[1] + column, nowhere)
    into = token[:, None] + (tokens + int(zero_row)) * per_image[:, None]  # (W, B, N)
    here = torch.arange(grid[0], device=device)[:, None] * filled[1] + torch.arange(grid[1], device=device)
    went = order.flatten().argsort()[here.flatten()]  # (H·W,) of W·N
    area = math.prod(window)
    back = went // area * (images * area) + went % area + area * per_image[:, None]  # (B, H·W)
    return Windows(grid, area, into.flatten(), back.flatten(), groups, zero_row, whole)


def _shift(side: int, count: int, shifted: bool) -> int:
    """Half a window, if there is more than one; without a branch, so that one exported program serves all sizes."""
    return side // 2 * torch.sym_min(1, count - 1) if shifted else 0  # type: ignore[return-value]


def _may_attend(places: Tensor, real: Tensor, window: Size, masked: bool) -> Tensor:
    """(..., N, 2) places -> (..., N, N): neighbours, and no key that is not there."""
    apart = (places[..., :, None, :] - places[..., None, :, :]).abs()
    near = (apart < places.new_tensor(window)).all(-1)
    return near & real[..., None, :] if masked else near


def _by_kind(
    order: Tensor, places: Tensor, real: Tensor, end: Size, window: Size, shift: Size, masked: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Windows of one mask beside each other: [(index (W_i, N), mask (N, N) or None)]."""
    rows, columns = (
        _alike(count, side, moved, last)
        for count, side, moved, last in zip(order.shape[:2], window, shift, end, strict=True)
    )
    found: list[tuple[Tensor, Tensor | None]] = []
    for top, bottom, whole_rows in rows:
        for left, right, whole_columns in columns:
            whole = whole_rows and whole_columns
            mask = None if whole else _may_attend(places[top, left], real[top, left], window, masked)
            found.append((order[top:bottom, left:right].flatten(0, 1), mask))
    return found


def _alike(count: int, side: int, shift: int, end: int) -> list[tuple[int, int, bool]]:
    """(first, last + 1, whole) of the windows along an axis: whole ones together, the others each by itself.

    A window is whole if it neither wraps around nor passes `end`. All are but the last, or the last two where the grid
    was filled up.
    """
    whole = max(0, (end - shift) // side)
    return [(0, whole, True)] * (whole > 0) + [(i, i + 1, False) for i in range(whole, count)]
