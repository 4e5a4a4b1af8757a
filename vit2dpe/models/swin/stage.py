"""A stage of a Swin: patch merging, and blocks of attention within windows, shifted in every second one.

Names are timm's. `in_windows` decides which encodings serve in windows.

Legend: B images, H, W tokens along each axis, D width, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from ...attention.functional import FullMask, attend, merge_heads
from ...attention.modules import Attention
from ...attention.windows import Size, Windows, cut
from ...contextual import Contextual
from ...encodings import Dims, Position, PositionEncoding, build, terms
from ...encodings.base import overrides
from ...encodings.cycle import over_blocks
from ...encodings.split import build_once, words_of
from ...errors import ConfigError
from ...positions import Positions, is_tracing
from ...signal import Dense, LowRank, Signal
from ...spec import join_blocks
from ..layers import run_block
from ..parts import BlockParts

Spec = Position | Callable[[Dims], PositionEncoding]
WindowPositions = dict[tuple[Size, torch.device], Positions]


class SwinBlockArguments(TypedDict):
    """Arguments of `SwinBlock` that are the same in all blocks of a stage."""

    mlp_ratio: float
    qk: str
    qkv_bias: bool
    proj_drop: float
    attn_drop: float


class SwinStage(nn.Module):
    """Patch merging, except in the first stage, and blocks whose windows are shifted in every second one."""

    def __init__(
        self,
        position: Spec,
        dim: int,
        heads: int,
        grid: Size,
        window: Size,
        trained: Size,
        *,
        blocks: Sequence[int],
        depth: int,
        merge: bool,
        post_norm: bool,
        drop_path: Sequence[float],
        **block_arguments: Unpack[SwinBlockArguments],
    ) -> None:
        super().__init__()
        self.train_grid, self.first = grid, blocks[0] if blocks else 0
        self.window = _within(window, grid)
        self.trained_window: Size = trained if all(trained) else self.window
        self.own_window_policy, self.padding, self.grad_checkpointing = "keep", "mask", False
        dims = Dims(dim, heads, self.trained_window, depth=depth)
        self.downsample = PatchMerging(dim, post_norm) if merge else nn.Identity()
        self.position = in_windows(position, dims)
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                heads,
                position=in_windows(position, Dims(dim, heads, self.trained_window, block, depth)),
                post_norm=post_norm,
                drop_path=rate,
                **block_arguments,
            )
            for block, rate in zip(blocks, drop_path, strict=True)
        )

    def start_as_identity(self) -> None:
        """Norms behind attention and MLP start at 0, as in Swin V2."""
        for block in self.blocks:
            if isinstance(block, SwinBlock) and block.post_norm:
                for norm in (block.norm1, block.norm2):
                    nn.init.zeros_(norm.get_parameter("weight"))

    @property
    def window_policy(self) -> str:
        """Window policy at another size: that of the innermost `vit2dpe.use_policy`, else this stage's own."""
        for settings in overrides():
            if self in settings.window_policies:
                return settings.window_policies[self]
        return self.own_window_policy

    def window_at(self, grid: Size) -> Size:
        """(h, w) of a window where the stage has this grid."""
        if self.window_policy == "keep":
            return self.window
        rows, columns = (
            max(1, side * size // train) for side, size, train in zip(self.window, grid, self.train_grid, strict=True)
        )
        return rows, columns

    def rolled(self, window: Size) -> Size | None:
        """How far timm rolls the grid in every second block: by the windows at the training size; None: not as timm."""
        if self.padding != "timm":
            return None
        several = [size > side for size, side in zip(self.train_grid, self.window, strict=True)]
        return window[0] // 2 * several[0], window[1] // 2 * several[1]

    def resize(self, grid: Size, window: Size) -> None:
        """Make another grid and window the ones that windows and encodings are measured by."""
        self.train_grid = grid
        self.window = self.trained_window = _within(window, grid)

    def forward(self, x: Tensor, cache: WindowPositions | None = None) -> Tensor:
        """(B, H, W, D) -> (B, H', W', D')

        Args:
            cache: positions of the windows, shared by the stages of one forward pass; updated in place.
        """
        x = self.downsample(x)
        images, grid = x.shape[0], (x.shape[1], x.shape[2])
        if is_tracing():  # a traced graph serves one size, as timm's does, and any batch
            grid = int(grid[0]), int(grid[1])
        window = self.window_at(grid)
        at = _window_positions(window, x.device, cache)
        signal = in_full(self.position(at))
        masked, rolled = self.padding == "mask", self.rolled(window)
        ways = [
            cut(grid, window, images, shifted=shifted, masked=masked, device=x.device, rolled=rolled)
            for shifted in (False, True)[: len(self.blocks)]
        ]
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, signal, at, ways[i % 2], index=self.first + i, recompute=self.grad_checkpointing)
        return x

    def extra_repr(self) -> str:
        return f"train_grid={self.train_grid}, window={self.window}, window_policy={self.window_policy!r}"


class PatchMerging(nn.Module):
    """Two by two tokens become one of twice the width; a grid of odd size is filled up with zeros."""

    def __init__(self, dim: int, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm = nn.LayerNorm(dim if post_norm else 2 * dim)
        self.reduction = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D / 2) -> (B, H / 2, W / 2, D)"""
        x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # Columns before rows, alone in the project: the order in which the original stacks the four.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        out: Tensor = self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))
        return out


class WindowAttention(Attention):
    """Attention within windows: the same signal for all, one call for those without a mask and one for the rest."""

    attends_in_parts = True  # maps of the two calls are one (`attention_maps`)

    def forward(self, x: Tensor, signal: Signal, windows: Windows) -> Tensor:  # type: ignore[override]
        images = x.shape[0]
        q, k, v, signal, scale = self.split(windows.split(x), signal)
        dropout = self.attn_drop if self.training else 0.0
        sizes = [count * images for count, _ in windows.groups]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), windows.groups, strict=True)
        outputs = [
            attend(a, b, c, signal, None if mask is None else FullMask(mask), scale, dropout)
            for a, b, c, (_, mask) in parts
        ]
        rows = [merge_heads(part) for part in outputs]
        out = torch.cat(rows) if len(rows) > 1 else rows[0]
        projected: Tensor = self.proj_drop(self.proj(windows.join(out, images)))
        return projected


class SwinBlock(BlockParts):
    """Window attention and MLP under timm's names (`norm1`, `attn`, `norm2`, `mlp`).

    An encoding of the block's own lives in `attn.position`; its signal joins the stage's.
    """

    attention = WindowAttention

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        position: PositionEncoding,
        post_norm: bool,
        drop_path: float,
        **parts: Unpack[SwinBlockArguments],
    ) -> None:
        own = position if position.gives else None
        super().__init__(dim, heads, norm_layer=nn.LayerNorm, position=own, drop_path=drop_path, **parts)
        self.post_norm = post_norm

    def forward(self, x: Tensor, signal: Signal, at: Positions, windows: Windows) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)"""
        if self.attn.position is not None:
            signal = in_full(signal.plus(self.attn.position(at)))
        if self.post_norm:
            x = x + self.drop_path1(self.norm1(self.attn(x, signal, windows)))
            x = x + self.drop_path2(self.norm2(self.mlp(x)))
        else:
            x = x + self.drop_path1(self.attn(self.norm1(x), signal, windows))
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


def _window_positions(window: Size, device: torch.device, cache: WindowPositions | None) -> Positions:
    """The positions of a window, made once a forward for all stages that have it.

    Each stage makes its own where a graph is traced, whose sizes have no hash, and where `cache` cannot be written to:
    torch.fx passes an immutable dictionary.
    """
    if type(cache) is not dict or torch.compiler.is_compiling():
        return Positions.grid(window, device)
    if (window, device) not in cache:
        cache[window, device] = Positions.grid(window, device)
    return cache[window, device]


def _within(window: Size, grid: Size) -> Size:
    return min(window[0], grid[0]), min(window[1], grid[1])


def in_full(signal: Signal) -> Signal:
    """Materializes bias tables once for all windows."""
    bias = tuple(term if isinstance(term, LowRank | Contextual) else Dense(term.dense()) for term in signal.bias)
    return signal.with_bias(bias).with_blocks(tuple([in_full(block) for block in signal.blocks]), signal.order)


def tokens_of(position: Spec, dims: Dims) -> PositionEncoding:
    """The terms that are added to tokens."""
    return over_blocks([[term for term in word if term.gives == {"token"}] for word in _words(position, dims)])


def in_windows(position: Spec, dims: Dims) -> PositionEncoding:
    """The terms that act within windows: those of a block, or where `dims` names none, those that blocks share."""
    inside = [[term for term in word if term.gives != {"token"}] for word in _words(position, dims)]
    for term in chain(*inside):
        name = type(term).__name__
        if "token" in term.gives:
            raise ConfigError(
                f"{name} gives tokens and {', '.join(sorted(term.gives - {'token'}))} at once; Swin adds "
                "tokens on the whole grid and does the rest within windows: give them as two terms"
            )
        if not term.relative:
            raise ConfigError(
                f"{name} is not relative: what it does depends on where tokens are, but every window of a Swin has the "
                "same places; relative encodings serve there (relative, logcpb, rope, rope_mixed, alibi, ...), and "
                "token encodings before the first stage (sincos, learned, ...)"
            )
    return over_blocks([[term for term in word if term.per_block == (dims.block is not None)] for word in inside])


def _words(position: Spec, dims: Dims) -> list[list[PositionEncoding]]:
    """The terms of each word that blocks follow in turn; of a block those of its own."""
    position = join_blocks(position)
    if isinstance(position, PositionEncoding) or not (isinstance(position, str) or callable(position)):
        raise ConfigError(
            "a Swin builds its encodings for each stage and block, whose heads and windows differ: position must be a "
            f"spec or a function from Dims to an encoding, got {type(position).__name__}"
        )
    if isinstance(position, str) and dims.block is None:
        return [list(word.values()) for word in build_once(words_of(position, dims.depth), dims)]
    return [terms(build(position, dims) if isinstance(position, str) else position(dims))]
