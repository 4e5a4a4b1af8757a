"""Attention within the windows of a grid, leading tokens with everything: what full attention gives under that mask.

    out = softmax(logits under same_tile(window)) v,   same_tile: ⌊p / window⌋ = ⌊q / window⌋ along every axis

Queries, keys and values are projected and turned on the whole grid, so that pairs with leading tokens, which do not
turn, are those of full attention; then they are cut. A leading token stands among the keys of every window, and its own
query reads all keys. Memory and time grow with tokens x window. (docs/decisions/0029)

Legend: B images, P leading tokens, N tokens of the grid, W windows, n tokens of one, H heads, Dh head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contextual import Contextual
from ..positions import Positions
from ..segments import Segments
from ..signal import Bias, Dense, Signal
from .contract import contract
from .functional import OBSERVER, FullMask, Observer, attend, merge_heads, rotate_qk
from .kernels import Selection
from .windows import Windows

Split = Callable[[Tensor, Signal], tuple[Tensor, Tensor, Tensor, Signal, float | None]]


class Near(NamedTuple):
    """A bias within windows.

    Args:
        tensor: (W|1, H, n, P + n).
        lead: what leading queries get, (1, H, P, P + N); None: nothing.
    """

    tensor: Tensor
    lead: Tensor | None = None

    def dense(self) -> Tensor:
        return self.tensor


class Tiles(NamedTuple):
    """How tokens attend within the windows of a grid.

    Args:
        windows: how the grid is cut.
        token: (W, n) which token of the grid stands where; where the grid was filled up, any.
        at: where the P + N tokens are.
        side: the extent that a block's own encoding is measured by; None: that of the grid.
        signal: rotations on the whole grid (P + N tokens), temperature, and biases of windows, `Near` or `Contextual`.
    """

    windows: Windows
    token: Tensor
    at: Positions
    side: tuple[int, ...] | None = None
    signal: Signal = Signal()

    def of_block(self, index: int) -> Tiles:
        """With what a block has of a Signal whose blocks follow different words."""
        return Tiles(self.windows, self.token, self.at, self.side, self.signal.of_block(index))

    def plus(self, signal: Signal) -> Tiles:
        """With what another encoding does."""
        return Tiles(self.windows, self.token, self.at, self.side, self.signal.plus(signal))

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, P + N, Dh) -> (W·B, H, n, Dh), without leading tokens; with zero rows the last of N + 1 is theirs."""
        heads, (height, width) = x.shape[1], self.windows.grid
        rows = x[:, :, self.at.prefix :].transpose(1, 2).flatten(2)  # (B, N, D)
        if self.windows.zero_row and self.windows.order is not None:
            found = self.windows.pick(rows, self.windows.order)
        else:
            found = self.windows.split(rows.unflatten(1, (height, width)))
        heads_apart: Tensor = found.unflatten(-1, (heads, -1)).transpose(1, 2)
        return heads_apart

    def places(self, images: int) -> tuple[Tensor, Tensor]:
        """(N,), (N,): the window of each token of the grid, and which of its n tokens it is."""
        area = math.prod(self.windows.window)
        if self.windows.back is None:
            found = self.token.flatten().argsort()
            return found // area, found % area
        found = self.windows.back[: math.prod(self.windows.grid)]  # of the first image, along (W, B, n)
        return found // (images * area), found % area

    def keys(self, x: Tensor) -> Tensor:
        """(B, H, P + N, Dh) -> (W·B, H, P + n, Dh): leading tokens stand before those of each window."""
        cut = self.cut(x)
        if not self.at.prefix:
            return cut
        lead = x[:, :, : self.at.prefix]
        return torch.cat([lead.repeat(cut.shape[0] // x.shape[0], 1, 1, 1), cut], dim=2)

    def biases(self, signal: Signal, images: int) -> list[Tensor]:
        """(1 or W·B, H, n, P + n), each term."""
        found = []
        for term in signal.bias:
            dense = term.dense()
            if isinstance(term, Near) and dense.shape[0] > 1:
                dense = dense[:, None].expand(-1, images, -1, -1, -1).flatten(0, 1)
            found.append(dense)
        return found


def attend_in(tiles: Tiles, split: Split, x: Tensor, dropout: float) -> Tensor:
    """What attention within windows gives for tokens (B, P + N, D), before the last projection -> (B, P + N, D).

    Args:
        split: from tokens and rotations to q, k, v (B, H, P + N, Dh), rotations that are left, and the scale of q·k.
        dropout: of the weights.
    """
    windows, prefix, images, count = tiles.windows, tiles.at.prefix, x.shape[0], x.shape[1]
    turns = Signal(None, tiles.signal.q_rotation, tiles.signal.k_rotation)
    near = Signal(bias=tiles.signal.bias, temperature=tiles.signal.temperature)
    contextual = any(isinstance(term, Contextual) for term in near.bias)  # contracted before anything turns
    tokens = F.pad(x, (0, 0, 0, 1)) if windows.zero_row else x  # a token of zeros, which has a key and a value too
    q, k, v, left, scale = split(tokens, Signal() if contextual else turns)
    if contextual:
        near, left = contract(near, tiles.cut(q), tiles.keys(k)), turns
    q, k, _ = rotate_qk(q, k, left)
    biases = tiles.biases(near, images)
    first = tuple(Dense(term.lead) for term in near.bias if isinstance(term, Near) and term.lead is not None)
    lead = q[:, :, :prefix], k[:, :, :count], v[:, :, :count], Signal(bias=first, temperature=near.temperature)
    with _observed(tiles, q[:, :, :count], lead[1], biases, lead[3], scale):
        sizes = [number * images for number, _ in windows.groups]
        parts = zip(*(t.split(sizes) for t in (tiles.cut(q), tiles.keys(k), tiles.keys(v))), strict=True)
        rows: list[Tensor] = []
        start = 0
        for (a, b, c), (_, mask), size in zip(parts, windows.groups, sizes, strict=True):
            terms = tuple(Dense(bias if bias.shape[0] == 1 else bias[start : start + size]) for bias in biases)
            full = None if mask is None else FullMask(F.pad(mask, (prefix, 0), value=True))
            out = attend(a, b, c, Signal(bias=terms, temperature=near.temperature), full, scale, dropout)
            rows, start = [*rows, merge_heads(out)], start + size
        found = windows.join(torch.cat(rows) if len(rows) > 1 else rows[0], images).flatten(1, 2)  # (B, N, D)
        if not prefix:
            return found
        leading = merge_heads(attend(*lead, None, scale, dropout))  # (B, P, D)
    return torch.cat([leading, found], dim=1)


@contextmanager
def _observed(
    tiles: Tiles, q: Tensor, k: Tensor, biases: list[Tensor], lead: Signal, scale: float | None
) -> Iterator[None]:
    """Whoever looks on receives one attention of all tokens under a mask, and which implementations its parts take."""
    observer = None if torch.compiler.is_compiling() else OBSERVER.get()
    if observer is None:
        yield
        return
    window, slot = tiles.places(q.shape[0])
    same = F.pad((window[:, None] == window), (k.shape[2] - len(slot), 0, q.shape[2] - len(slot), 0), value=True)
    bias = (Spread(biases, lead.bias, window, slot, q.shape[0], tiles.at.prefix),) if biases or lead.bias else ()
    observer.attended(q, k, Signal(bias=bias, temperature=lead.temperature), same[None, None], scale)
    side = "x".join(map(str, tiles.windows.window))
    why = f"{len(tiles.token)} windows of {side}; no matrix over all tokens"
    observer.selected("mask", Selection("windows", why))
    token = OBSERVER.set(Parts(observer))
    try:
        yield
    finally:
        OBSERVER.reset(token)


class Parts(NamedTuple):
    """Hands on which implementations are selected, and no arguments of parts."""

    observer: Observer

    def attended(
        self, q: Tensor, k: Tensor, signal: Signal, mask: Tensor | Segments | None, scale: float | None
    ) -> None:
        return

    def selected(self, what: str, selection: Selection) -> None:
        self.observer.selected(what, selection)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, dropout: float, scale: float, causal: bool
    ) -> None:
        self.observer.fused(q, k, v, added, dropout, scale, causal)


class Spread(NamedTuple):
    """The biases of windows as one of all tokens: (B|1, H, P + N, P + N), of pairs of other windows any number."""

    biases: list[Tensor]
    lead: tuple[Bias, ...]
    window: Tensor
    slot: Tensor
    images: int
    prefix: int

    def dense(self) -> Tensor:
        whole: Tensor | None = None
        for bias in self.biases:
            each = bias[:, None] if bias.shape[0] == 1 else bias.unflatten(0, (-1, self.images))  # (W|1, B|1, H, n, m)
            rows = each[self.window if len(each) > 1 else 0 * self.window, :, :, self.slot]  # (N, B|1, H, m)
            columns = torch.cat([torch.arange(self.prefix, device=self.slot.device), self.slot + self.prefix])
            term = F.pad(rows[..., columns].permute(1, 2, 0, 3), (0, 0, self.prefix, 0))
            whole = term if whole is None else whole + term
        for one in self.lead:
            term = F.pad(one.dense(), (0, 0, 0, len(self.slot)))
            whole = term if whole is None else whole + term
        if whole is None:
            raise ValueError("there is no bias to spread")
        return whole
