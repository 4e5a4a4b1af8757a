"""Blocks of a ViT that attend within windows, among blocks that attend globally: ViTDet, SAM, RADIO.

A block in windows gives what the block gives under a mask, `attention.masks.same_tile`: encodings act as they do on the
whole grid, leading tokens attend to everything and everything to them, and a window that is not full holds the tokens
that are there. Where every window would be the whole grid, the block is the plain one. A complete grid is cut
(`attention.tiles`); where patches were left out, or a mask is given, or the grid has other than two axes, the mask
itself is used, which tokens of zeros are not in: they are refused there. (docs/decisions/0029)

Sources: ViTDet, arXiv 2203.16527; SAM, arXiv 2304.02643 (timm, `vision_transformer_sam.py`); RADIO, arXiv 2412.07679;
neighbourhoods: NATTEN, arXiv 2204.07143. How ours differs: ViTDet and SAM fill the grid up with tokens of zeros, after
the norm, which are attended to (`window_kind="zeros"`), and have tables of the window's size (`window_tables=True`);
RADIO's leading tokens skip blocks in windows; NATTEN moves the neighbourhoods at a border inwards, ours end there.

Legend: B images, P leading tokens, N tokens of the grid, W windows, n tokens of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import masks
from ..attention.functional import Causal, FullMask, Mask
from ..attention.tiles import Near, Tiles
from ..attention.windows import Size, cut
from ..contextual import Contextual
from ..encodings import PositionEncoding, encodings_of, terms
from ..errors import ConfigError, unknown
from ..positions import Positions, is_tracing, numbers
from ..signal import Signal

KINDS = ("tiles", "zeros", "around")
View = tuple[()] | tuple[Mask | Tiles]  # the further argument of a block, if any: those of other people take none


class Windowing(NamedTuple):
    """Which blocks attend within windows.

    Args:
        side: (rows, columns) of a window in tokens, or along all axes.
        blocks: the numbers of these blocks.
        kind: a word of `KINDS`.
        tables: whether the encodings that these blocks own are measured by the window instead of the grid.
    """

    side: tuple[int, ...]
    blocks: frozenset[int]
    kind: str
    tables: bool

    def __str__(self) -> str:
        own = ", own encodings measured by them" if self.tables else ""
        return f"blocks {', '.join(map(str, sorted(self.blocks)))} in windows of {_spell(self.side)} ({self.kind}{own})"

    @classmethod
    def of(
        cls,
        window: int | Sequence[int] | None,
        global_blocks: Sequence[int],
        kind: str,
        tables: bool,
        depth: int,
        axes: int = 2,
    ) -> Windowing | None:
        """Of the arguments of a ViT; None without windows.

        Raises:
            ConfigError: for blocks that there are not, and arguments that do nothing.
        """
        if not window:
            if global_blocks or kind != KINDS[0] or tables:
                raise ConfigError("global_blocks, window_kind and window_tables go with a window: give window=14")
            return None
        if kind not in KINDS:
            raise unknown("window_kind", kind, KINDS)
        side = (window,) * axes if isinstance(window, int) else tuple(window)
        if len(side) != axes or min(side) < 1:
            raise ConfigError(f"window must be one side or {axes}, one of each axis, at least 1, got {window!r}")
        if axes != 2 and (kind == "zeros" or tables):
            raise ConfigError(f"window_kind='zeros' and window_tables are for rows and columns, got {axes} axes")
        if kind == "around" and not all(one % 2 for one in side):
            raise ConfigError(f"a window around each token has an odd side, got {_spell(side)}")
        if kind == "around" and tables:
            raise ConfigError(
                "window_tables goes with windows that the grid is cut into, not with window_kind 'around'"
            )
        if isinstance(global_blocks, int) or not all(isinstance(i, int) and -depth <= i < depth for i in global_blocks):
            raise ConfigError(
                f"global_blocks are the numbers of several blocks, 0 to {depth - 1} or from the end -{depth} to -1, "
                f"such as (0,): got {global_blocks!r}"
            )
        inside = frozenset(range(depth)) - {i % depth for i in global_blocks}
        return cls(side, inside, kind, tables)

    def owned(self, blocks: nn.ModuleList) -> list[tuple[PositionEncoding, nn.Module]]:
        """Encodings that are measured by the window, each that leads a block with its attention."""
        attentions = [
            getattr(block, "attn", None) for i, block in enumerate(blocks) if self.tables and i in self.blocks
        ]
        found = ((getattr(attention, "position", None), attention) for attention in attentions)
        return [(p, part) for p, part in found if isinstance(p, PositionEncoding) and isinstance(part, nn.Module)]

    def covers(self, at: Positions) -> bool:
        """Whether every window is the whole grid, and blocks are plain. Not in a graph, which sizes may not shape."""
        if torch.compiler.is_compiling() or isinstance(at.extent, Tensor):
            return False
        if self.tables or self.kind == "zeros":
            return at.extent == self.side
        reach = [(side + 1) // 2 if self.kind == "around" else side for side in self.side]
        return all(side >= size for side, size in zip(reach, at.extent, strict=True))

    def grids(self, grid: tuple[int, ...], depth: int) -> list[tuple[int, ...]]:
        """The extent that each block's own encoding is measured by, where all others have this grid."""
        return [self.side if self.tables and i in self.blocks else grid for i in range(depth)]

    def check(self, shared: PositionEncoding, own: Sequence[PositionEncoding | None]) -> None:
        """Refuse encodings that these windows cannot serve.

        Args:
            own: of each block.

        Raises:
            ConfigError: naming the encoding and the reason.
        """
        mine = [term for i, one in enumerate(own) if one is not None and i in self.blocks for term in terms(one)]
        for term in (*terms(shared), *mine) if self.kind == "zeros" else ():
            if term.gives - {"token"} and not (term.gives <= {"token", "bias"} and term.relative):
                raise ConfigError(
                    f"window_kind='zeros' fills windows up with tokens that have no place, and {type(term).__name__} "
                    "needs one; ViTDet and SAM, whose way it is, have relative biases and vectors added to tokens: "
                    "with other encodings take 'tiles'"
                )
        for term in mine if self.tables else ():
            if term.gives and not term.relative:
                raise ConfigError(
                    f"window_tables measures what blocks own by the window, whose places are the same in every window, "
                    f"and {type(term).__name__} is not relative: leave window_tables out"
                )


def views(
    windowing: Windowing | None,
    blocks: int,
    position: PositionEncoding,
    x: Tensor,
    signal: Signal,
    at: Positions,
    mask: Tensor | Causal | None,
) -> list[View]:
    """What each block is given beside tokens, Signal and places: a mask, `Tiles`, or nothing.

    Args:
        blocks: how many.
        position: the encoding that blocks share, and `signal` what it gives.
        x: tokens (B, P + N, D) at the input of the first block.
        mask: of all blocks.

    Raises:
        ConfigError: where only a mask could serve, and encodings are measured by a window, or windows are filled up;
            for a grid of a spacing of which patches were left out; and for tables that places outside of a small grid
            are not in.
    """
    if windowing is None or not windowing.blocks or windowing.covers(at):
        return [_given(mask)] * blocks
    of_all = bool(at.spacing) and not at.by_sample() and at.valid is None
    complete = at.whole or (of_all and at.coords.shape[:2] == (1, math.prod(at.one_extent)))
    if complete and mask is None and at.axes == 2 and windowing.kind != "around":
        tiles = with_encoding(_tiles(windowing, x.shape[0], at), position, signal)
        return [(tiles.of_block(i),) if i in windowing.blocks else () for i in range(blocks)]
    if windowing.tables:
        raise ConfigError(
            "window_tables measures what blocks own by the window, and with attn_mask, is_causal or patches that are "
            "left out attention is under a mask on the whole grid: leave one of them out"
        )
    if windowing.kind == "zeros" and (at.by_sample() or _filled(at.one_extent, windowing.side)):
        raise ConfigError(
            "window_kind='zeros' fills windows up with tokens that no mask has, and with attn_mask, is_causal, patches "
            "that are left out or images of several sizes attention is under a mask: leave one of them out, or give a "
            f"grid that windows of {_spell(windowing.side)} divide"
        )
    if at.spacing and not complete:
        raise ConfigError("windows of a grid that has a spacing, and of which patches were left out, are not known")
    on = Positions.grid(at.one_extent, at.coords.device).with_prefix(at.prefix) if at.spacing else at
    near = _mask(windowing, on)
    given = mask.matrix() if isinstance(mask, Causal) else mask
    inside = _given(FullMask(near) if given is None else masks.both(near, given))
    return [inside if i in windowing.blocks else _given(mask) for i in range(blocks)]


def _filled(grid: tuple[int, ...], window: tuple[int, ...]) -> bool:
    """Whether windows hold more places than the grid."""
    return any(size % side for size, side in zip(grid, window, strict=True))


def _spell(side: tuple[int, ...]) -> str:
    return "x".join(map(str, side))


def _given(mask: Mask | None) -> View:
    return () if mask is None else (mask,)


def _mask(windowing: Windowing, at: Positions) -> Tensor:
    """(B|1, 1, P + N, P + N) who may attend to whom."""
    if windowing.kind == "around":
        return masks.window(at, at, [side // 2 for side in windowing.side])
    return masks.same_tile(at, at, windowing.side)


def _tiles(windowing: Windowing, images: int, at: Positions) -> Tiles:
    """The windows of a complete grid, without what encodings do there."""
    filled = windowing.kind == "zeros"
    rows, columns = at.one_extent
    grid: Size = (int(rows), int(columns)) if is_tracing() else (rows, columns)
    side = windowing.side[0], windowing.side[1]
    if not filled and not torch.compiler.is_compiling():  # there a comparison may not shape the graph
        side = min(side[0], grid[0]), min(side[1], grid[1])
    windows = cut(grid, side, images, shifted=False, masked=not filled, device=at.coords.device)
    area = math.prod(side)
    if windows.order is None:
        index = windows.split(torch.arange(math.prod(grid), device=at.coords.device).view(1, *grid, 1)).squeeze(-1)
    else:
        index = windows.order.view(-1, images, area)[:, 0]
    return Tiles(windows, index, at, windowing.side if windowing.tables else None)


def own_in_tiles(position: nn.Module, tiles: Tiles) -> tuple[Signal, Tiles]:
    """What a block's own encoding adds to tokens, as a Signal, and the windows with what it does in them."""
    if not isinstance(position, PositionEncoding):
        raise ConfigError(f"a block in windows needs an encoding of this package, got {type(position).__name__}")
    if position.gives == {"bias"}:
        return Signal(), with_encoding(tiles, position, None)
    whole = position(tiles.at if tiles.side is None else _measured(tiles.at, tiles.side))
    return Signal(token=whole.token), with_encoding(tiles, position, whole)


def with_encoding(tiles: Tiles, position: PositionEncoding, whole: Signal | None) -> Tiles:
    """Windows with what an encoding does in them.

    Args:
        whole: what it gives for the whole grid, of whose biases nothing is used; None: it gives biases alone.
    """
    near = lead = Signal()
    if "bias" in position.gives:
        relative = all(term.relative for term in terms(position) if "bias" in term.gives)
        _check_reach(tiles, position)
        key = ("tile", tiles.windows.window, relative, tiles.side)
        near = position(*tiles.at.memoize(key, lambda: _places(tiles, relative)))
        lead = _lead(tiles, position)
    return tiles.plus(_joined(near if whole is None else whole, near, lead))


def _joined(whole: Signal, near: Signal, lead: Signal) -> Signal:
    """Rotations and temperature of the first, biases of the others, looked up; so too for the parts of blocks."""
    pairs = zip(near.bias, lead.bias or [None] * len(near.bias), strict=True)
    bias = tuple(
        term if isinstance(term, Contextual) else Near(term.dense(), None if first is None else first.dense())
        for term, first in pairs
    )
    parts = [
        _joined(one, near.blocks[i] if near.blocks else Signal(), lead.blocks[i] if lead.blocks else Signal())
        for i, one in enumerate(whole.blocks)
    ]
    turned = Signal(None, whole.q_rotation, whole.k_rotation, bias, whole.temperature)
    return turned.with_blocks(tuple(parts), whole.order)


def _lead(tiles: Tiles, position: PositionEncoding) -> Signal:
    """What leading queries get, biases (1, H, P, P + N), where it is not zero: of `relative(prefix=true)`."""
    if not tiles.at.prefix or all(getattr(part, "prefix_bias", None) is None for part in position.modules()):
        return Signal()
    at = tiles.at if tiles.side is None else _measured(tiles.at, tiles.side)
    lead: Signal = position(Positions(at.coords[:, :0], at.extent, at.prefix, at.on_grid, at.spacing), at)
    return lead


def _check_reach(tiles: Tiles, position: PositionEncoding) -> None:
    """Refuse tables over the offsets of a grid that is smaller than a window that is filled up."""
    grid, side = tiles.at.one_extent, tiles.windows.window
    if not tiles.windows.zero_row or tiles.side is not None or all(s <= n for s, n in zip(side, grid, strict=True)):
        return
    for part in encodings_of(position):
        if "bias" in part.gives and part.resizes and (part.policy is None or part.policy.name == "resize"):
            raise ConfigError(
                f"window_kind='zeros' fills windows of {_spell(side)} up beyond the grid of {_spell(grid)}, where the "
                f"table of {type(part).__name__} ends: take smaller windows, 'tiles', or window_tables=True"
            )


def _places(tiles: Tiles, relative: bool) -> tuple[Positions, Positions]:
    """Places of the queries and keys of windows: of all of them, (W, n, d), or of one where that serves all."""
    at, side = tiles.at, tiles.windows.window
    if tiles.windows.zero_row:  # a window may hold more places than the grid
        step = numbers(at.spacing or (1.0,) * at.axes, at.coords.device)
        coords = at.coords[:, :1] + (Positions.grid(side, at.coords.device).coords * step).to(at.coords)
        inside = not at.spacing and all(few <= most for few, most in zip(side, at.extent, strict=True))
        k = Positions(coords, at.extent, at.prefix, inside, at.spacing)
    else:
        k = at.take(tiles.token[0] if relative else tiles.token)
    if tiles.side is not None:
        k = Positions(k.coords, tiles.side, k.prefix, not k.spacing, k.spacing)
    return (k.with_prefix(0) if k.prefix else k), k


def _measured(at: Positions, extent: tuple[int, ...]) -> Positions:
    """These places as those of a grid of another extent, for what takes them as they are."""
    return at.memoize(("measured", extent), lambda: Positions(at.coords, extent, at.prefix, spacing=at.spacing))
