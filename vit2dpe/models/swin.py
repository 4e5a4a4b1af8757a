"""The Swin transformer, V1 and V2, with any encoding that serves in windows: image -> stages of windows -> logits.

Parameter names and constructor arguments are timm's (`timm/models/swin_transformer.py`, `swin_transformer_v2.py`), so
weights go both ways. Sources: Swin, arXiv 2103.14030; Swin V2, arXiv 2111.09883.

    x = x + WindowAttention(norm1(x));  x = x + MLP(norm2(x))           V1, `post_norm=False`
    x = x + norm1(WindowAttention(x));  x = x + norm2(MLP(x))           V2, `post_norm=True`, `qk="cosine"`

How ours differs: the encoding is an argument; any height and width is taken at run time, filled up to whole windows
whose filled-up places are masked; what a window does at another size is said by `window_policy` and never changes by
itself; the mask of shifted windows is a test of places (`swin_windows.py`) and boolean.

Limits: a program of torch.export with dynamic height and width serves the sizes at which every stage has several
windows along both axes, because one is special to the exporter.

Legend: B images, H, W tokens along each axis, D width, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from operator import add

import torch
from timm.layers import ClassifierHead, DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import Attention, attend
from ..encodings import Dims, NoPosition, PositionEncoding, build, terms
from ..errors import ConfigError, unknown
from ..layers import Hide, PatchEmbed, add_token
from ..positions import Positions
from ..signal import Dense, LowRank, Signal
from .contract import pair
from .swin_contract import SwinContract, check_pool, per_stage
from .swin_weights import accept_foreign
from .swin_windows import Size, Windows, cut

Word = str | Callable[[Dims], PositionEncoding]


class Swin(SwinContract):
    """Hierarchical transformer of shifted windows.

    Args:
        position: the encoding, a word such as "relative", "logcpb" or "sincos+rope_mixed", or a function from Dims
            (width, heads and window of a stage, number of the block) to an encoding. Terms that give tokens are added
            after the patch embedding; the others are made for each stage, or each block where they are `per_block`,
            see the places within a window, and must be `relative`, because every window looks the same to them.
        window_policy: what a window does at another size than the training size. "keep": it keeps its side, the grid
            is filled up to whole windows. "scale": its sides grow and shrink with the grid (rounded down, at least 1),
            and the encodings do what they do at another extent: tables are resized (`relative(resize=...)`), networks
            and formulas evaluated anew. `vit2dpe.use_policy(model, "scale+interpolate")` sets both for a while.
        padding: "mask": filled-up places are not attended to. "attend": they are, as tokens of zeros, which is what
            torchvision does.
        img_size: the training size in pixels, H or (H, W). A window larger than a stage's training grid becomes that
            grid, as in timm: no larger offset would be trained.
        patch_size: P or (rows, columns).
        depths, num_heads: blocks and heads of each stage; the width is `embed_dim` and doubles from stage to stage.
        window_size: side, (h, w), or one of either for each stage; two numbers are (h, w).
        pretrained_window_sizes: the windows that the encodings were trained on, where they are others (0: the same).
        qk: "dot", or "cosine" as in V2.
        post_norm: norms after attention and MLP, and after the reduction of patch merging, as in V2.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (the feature map to the head).
        mlp_ratio: one number, or one for each stage.
        qkv_bias, drop_rate (head), proj_drop_rate, attn_drop_rate, drop_path_rate: as in timm.
        dynamic_img_size: whether other sizes than `img_size` are taken at run time. Off, they are refused.
        dynamic_img_pad: fill images up to a multiple of the patch, below and on the right, instead of refusing them.
        device, dtype: where the parameters are made, and of which type.

    Raises:
        ConfigError: for sizes that do not fit each other, and encodings that make no sense in windows.
    """

    def __init__(
        self,
        position: Word = "relative",
        *,
        window_policy: str = "keep",
        padding: str = "mask",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Size | Sequence[int | Size] = 7,
        pretrained_window_sizes: int | Size | Sequence[int | Size] = 0,
        qk: str = "dot",
        post_norm: bool = False,
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_pool(global_pool)
        if padding not in ("mask", "attend"):
            raise unknown("padding", padding, ("mask", "attend"))
        if len(depths) != len(num_heads):
            raise ConfigError(f"depths and num_heads must name each stage: got {tuple(depths)} and {tuple(num_heads)}")
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_layers, self.embed_dim = len(depths), embed_dim
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.output_fmt, self.num_prefix_tokens = "NHWC", 0
        self.dynamic_img_size, self.dynamic_img_pad = dynamic_img_size, dynamic_img_pad
        sizes, trained = per_stage(window_size, len(depths)), per_stage(pretrained_window_sizes, len(depths), least=0)
        ratios = [mlp_ratio] * len(depths) if isinstance(mlp_ratio, int | float) else list(mlp_ratio)
        rates = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]  # grows linearly
        with torch.device(device) if device is not None else nullcontext():
            self.patch_embed = PatchEmbed(
                pair(patch_size),
                in_chans,
                embed_dim,
                norm=nn.LayerNorm,
                img_size=pair(img_size),
                any_size=dynamic_img_size,
                pad=dynamic_img_pad,
            )
            self.train_grid = self.patch_embed.grid(*pair(img_size))
            self.position = tokens_of(position, Dims(embed_dim, num_heads[0], self.train_grid, depth=sum(depths)))
            stages, grid = [], self.train_grid
            for i, depth in enumerate(depths):
                grid = grid if i == 0 else (-(-grid[0] // 2), -(-grid[1] // 2))
                stages.append(
                    SwinStage(
                        position,
                        embed_dim * 2**i,
                        num_heads[i],
                        grid,
                        sizes[i],
                        trained[i],
                        blocks=range(sum(depths[:i]), sum(depths[: i + 1])),
                        depth=sum(depths),
                        merge=i > 0,
                        padding=padding,
                        qk=qk,
                        post_norm=post_norm,
                        mlp_ratio=ratios[i],
                        qkv_bias=qkv_bias,
                        proj_drop=proj_drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=rates[sum(depths[:i]) :][:depth],
                    )
                )
            self.layers = nn.Sequential(*stages)
            self.norm = nn.LayerNorm(self.num_features)
            self.head = ClassifierHead(
                self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
            )
        self.head_hidden_size = self.head.num_features
        self.window_policy = window_policy
        self.feature_info = [
            dict(module=f"layers.{i}", num_chs=embed_dim * 2**i, reduction=max(self.patch_embed.patch_size) * 2**i)
            for i in range(len(depths))
        ]
        self.init_weights(needs_reset=False)
        self.to(dtype=dtype)
        self.register_load_state_dict_pre_hook(accept_foreign)

    def embed(self, images: Tensor, hide: Hide | None = None) -> Tensor:
        """(B, C, height, width) -> (B, H, W, D), token terms of the encoding added; `hide` changes patches first."""
        x, at = self.patch_embed(images)
        x, at = (x, at) if hide is None else hide(x, at)
        return to_grid(add_token(x, self.position(at)), at)

    def forward_features(self, images: Tensor, hide: Hide | None = None) -> Tensor:
        """(B, C, height, width) -> (B, H, W, D), the last stage's normalised feature map."""
        return self.norm(self.layers(self.embed(images, hide)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, D) -> (B, classes); the pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class SwinStage(nn.Module):
    """Patch merging, except in the first stage, and blocks whose windows are shifted in every second one."""

    def __init__(
        self,
        position: Word,
        dim: int,
        heads: int,
        grid: Size,
        window: Size,
        trained: Size,
        *,
        blocks: Sequence[int],
        depth: int,
        merge: bool,
        padding: str,
        post_norm: bool,
        drop_path: Sequence[float],
        **kwargs,
    ) -> None:
        super().__init__()
        self.train_grid, self.masked = grid, padding == "mask"
        self.window = _within(window, grid)
        self.trained_window: Size = trained if all(trained) else self.window
        self.window_policy, self.grad_checkpointing = "keep", False
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
                **kwargs,
            )
            for block, rate in zip(blocks, drop_path, strict=True)
        )

    def start_as_identity(self) -> None:
        """Norms behind attention and MLP start at 0, as in Swin V2."""
        for block in self.blocks:
            if block.post_norm:
                nn.init.zeros_(block.norm1.weight)  # type: ignore[arg-type, union-attr]
                nn.init.zeros_(block.norm2.weight)  # type: ignore[arg-type, union-attr]

    def window_at(self, grid: Size) -> Size:
        """(h, w) of a window where the stage has this grid."""
        if self.window_policy == "keep":
            return self.window
        rows, columns = (
            max(1, side * size // train) for side, size, train in zip(self.window, grid, self.train_grid, strict=True)
        )
        return rows, columns

    def resize(self, grid: Size, window: Size) -> None:
        """Make another grid and window the ones that windows and encodings are measured by."""
        self.train_grid = grid
        self.window = self.trained_window = _within(window, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H', W', D')"""
        x = self.downsample(x)
        images, grid = x.shape[0], (x.shape[1], x.shape[2])
        window = self.window_at(grid)
        at = Positions.grid(window, x.device)
        signal = in_full(self.position(at))
        ways = [
            cut(grid, window, images, shifted=shifted, masked=self.masked, device=x.device)
            for shifted in (False, True)[: len(self.blocks)]
        ]
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, signal, at, ways[i % 2], use_reentrant=False)
            else:
                x = block(x, signal, at, ways[i % 2])
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
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))


class SwinBlock(nn.Module):
    """Window attention and MLP under timm's names (`norm1`, `attn`, `norm2`, `mlp`).

    An encoding of the block's own lives in `attn.position`; its signal joins the stage's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        position: PositionEncoding,
        post_norm: bool,
        mlp_ratio: float,
        drop_path: float,
        proj_drop: float,
        **kwargs,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim)
        own = position if position.gives else None
        self.attn = WindowAttention(dim, heads, position=own, proj_drop=proj_drop, **kwargs)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, signal: Signal, at: Positions, windows: Windows) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)"""
        if self.attn.position is not None:
            signal = in_full(signal.plus(self.attn.position(at)))
        if self.post_norm:
            x = x + self.drop_path1(self.norm1(self.attn(x, signal, windows)))
            return x + self.drop_path2(self.norm2(self.mlp(x)))
        x = x + self.drop_path1(self.attn(self.norm1(x), signal, windows))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class WindowAttention(Attention):
    """Attention within windows: the same signal for all, one call for each kind of window."""

    def forward(self, x: Tensor, signal: Signal, windows: Windows) -> Tensor:  # type: ignore[override]
        images = x.shape[0]
        q, k, v, signal, scale = self.split(windows.split(x), signal)
        dropout = self.attn_drop if self.training else 0.0
        found, start = [], 0
        for count, mask in windows.groups:
            end = start + count * images
            found.append(attend(q[start:end], k[start:end], v[start:end], signal, mask, scale, dropout))
            start = end
        out = torch.cat([part.transpose(1, 2).flatten(2) for part in found]) if len(found) > 1 else found[0]
        out = out if len(found) > 1 else out.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(windows.join(out, images)))


def _within(window: Size, grid: Size) -> Size:
    return min(window[0], grid[0]), min(window[1], grid[1])


def to_grid(x: Tensor, at: Positions) -> Tensor:
    """(B, N, D) -> (B, H, W, D)"""
    return x.unflatten(1, at.extent)


def in_full(signal: Signal) -> Signal:
    """Bias terms that are looked up, looked up once for all kinds of windows."""
    bias = tuple(term if isinstance(term, LowRank) else Dense(term.dense()) for term in signal.bias)
    return signal._replace(bias=bias)


def tokens_of(position: Word, dims: Dims) -> PositionEncoding:
    """The terms that are added to tokens."""
    return _sum([term for term in _terms(position, dims) if term.gives == {"token"}])


def in_windows(position: Word, dims: Dims) -> PositionEncoding:
    """The terms that act within windows: those of a block, or where `dims` names none, those that blocks share."""
    found = [term for term in _terms(position, dims) if term.gives != {"token"}]
    for term in found:
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
    return _sum([term for term in found if term.per_block == (dims.block is not None)])


def _terms(position: Word, dims: Dims) -> list[PositionEncoding]:
    if isinstance(position, PositionEncoding) or not (isinstance(position, str) or callable(position)):
        raise ConfigError(
            "a Swin builds its encodings for each stage and block, whose heads and windows differ: position must be a "
            f"word or a function from Dims to an encoding, got {type(position).__name__}"
        )
    return terms(build(position, dims) if isinstance(position, str) else position(dims))


def _sum(parts: list[PositionEncoding]) -> PositionEncoding:
    return reduce(add, parts) if parts else NoPosition()
