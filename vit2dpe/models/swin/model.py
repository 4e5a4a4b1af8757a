"""The Swin transformer, V1 and V2, with any encoding that serves in windows: image -> stages of windows -> logits.

Parameter names and constructor arguments are timm's (`timm/models/swin_transformer.py`, `swin_transformer_v2.py`), so
weights go both ways. Sources: Swin, arXiv 2103.14030; Swin V2, arXiv 2111.09883.

    x = x + WindowAttention(norm1(x));  x = x + MLP(norm2(x))           V1, `post_norm=False`
    x = x + norm1(WindowAttention(x));  x = x + norm2(MLP(x))           V2, `post_norm=True`, `qk="cosine"`

How ours differs: the encoding is an argument; any height and width is taken at run time, filled up to whole windows
whose filled-up places are masked; the window at another size follows `window_policy` and never changes by
itself; the mask of shifted windows is a test of places (`windows.py`) and boolean.

Limits: a program of torch.export with dynamic height and width serves the sizes at which every stage has several
windows along both axes, because one is special to the exporter.

Legend: B images, H, W tokens along each axis, D width, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from timm.layers import ClassifierHead
from torch import Tensor, nn

from ...encodings import Dims
from ...errors import ConfigError
from ...positions import Positions
from ..arguments import check_arguments
from ..card import save_card
from ..layers import PatchEmbed, TokenFilter, add_token
from ..timm_api import FeatureInfo, pair
from .stage import Spec, SwinStage, WindowPositions, tokens_of
from .timm_api import TimmSwin, WindowSize, check_pool, per_stage
from .weights import convert_state_dict


class Swin(TimmSwin):
    """Hierarchical transformer of shifted windows.

    Args:
        position: the encoding, a spec such as "relative", "logcpb" or "sincos+rope_mixed", of each block in turn
            "relative/none" or a list, or a function from Dims (width, heads and window of a stage, number of the block)
            to an encoding. Terms that give tokens are added
            after the patch embedding; the others are made for each stage, or each block where they are `per_block`,
            get the places within a window, and must be `relative`, because every window has the same places.
        window_policy: the window at another size than the training size. "keep": it keeps its side, the grid
            is filled up to whole windows. "scale": its sides grow and shrink with the grid (rounded down, at least 1),
            and the encodings treat them as another extent: tables are resized (`relative(resize=...)`), networks
            and formulas evaluated anew. `vit2dpe.use_policy(model, "scale+interpolate")` sets both for a while.
        padding: "mask": filled-up places are not attended to. "attend": they are, as tokens of zeros, which is what
            torchvision does. "timm": so they are, but every second block rolls the grid before it is filled up, by half
            a window along axes that have several at the training size, at any size; what timm's Swin does.
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
        policy, temperature: what the encodings do at other sizes than `img_size`, see `vit2dpe.set_policy`; default:
            what each does by itself.
        device, dtype: of the parameters.

    Raises:
        ConfigError: for sizes that do not fit each other, and encodings that make no sense in windows.
    """

    def __init__(
        self,
        position: Spec = "relative",
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
        window_size: WindowSize = 7,
        pretrained_window_sizes: WindowSize = 0,
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
        policy: str | None = None,
        temperature: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_arguments(locals(), stages=True)
        super().__init__()
        check_pool(global_pool)
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
            stages, grid = [], pair(self.train_grid)
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
        self.padding = padding
        patch = self.patch_embed.patch_size
        self.feature_info = [
            FeatureInfo(module=f"layers.{i}", num_chs=embed_dim * 2**i, reduction=max(patch) * 2**i)
            for i in range(len(depths))
        ]
        self.init_weights(needs_reset=False)
        self.to(dtype=dtype)
        self.take_policy(policy, temperature)
        nn.Module.register_load_state_dict_pre_hook(self, convert_state_dict)

    save_card = save_card

    def embed(self, images: Tensor, token_filter: TokenFilter | None = None) -> Tensor:
        """(B, C, height, width) -> (B, H, W, D), token terms of the encoding added, after `token_filter`."""
        x, at = self.patch_embed(images)  # (B, N, D)
        x, at = (x, at) if token_filter is None else token_filter(x, at)
        return to_grid(add_token(x, self.position(at)), at)

    def forward_features(self, images: Tensor, token_filter: TokenFilter | None = None) -> Tensor:
        """(B, C, height, width) -> (B, H, W, D), the last stage's normalised feature map."""
        x = self.embed(images, token_filter)
        cache: WindowPositions = {}
        for stage in self.layers:
            x = stage(x, cache)  # (B, H, W, D), halved and widened by each stage but the first
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, D) -> (B, classes); the pooled features with `pre_logits`."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def to_grid(x: Tensor, at: Positions) -> Tensor:
    """(B, N, D) -> (B, H, W, D)"""
    grid: Tensor = x.unflatten(1, at.one_extent)
    return grid
