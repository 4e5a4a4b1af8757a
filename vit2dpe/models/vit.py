"""The vision transformer, with any encoding: image -> patches -> blocks -> logits.

Parameter names and constructor arguments are timm's (`timm/models/vision_transformer.py`), so weights go both ways.
Sources: ViT, arXiv 2010.11929; registers, arXiv 2309.16588. How ours differs: the encoding is an argument, any height
and width that the patch divides is taken at run time, and the class token owns no row of a position table.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Unpack, overload

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from ..encodings import Dims, Position, split_shared_and_per_block
from ..errors import ArgumentError, ConfigError, unknown
from ..positions import Positions
from ..signal import Signal
from .arguments import axes_of, check_arguments, sides
from .card import save_card
from .features import allow, spaced
from .layers import Block, PatchDrop, PatchEmbed, PostNormBlock, TokenFilter, block_inputs, run_blocks
from .mixed import (
    Images,
    Packed,
    Padded,
    Tokens,
    attention_pooled,
    drop_patches,
    embed_patches,
    given_back,
    laid_out,
    pooled,
    read,
)
from .parts import ACTS, BlockArguments, norm_factory
from .timm_api import POOLS, FeatureInfo, TimmViT, check_pool
from .weights import convert_state_dict
from .windowed import View, Windowing

Spacing = float | tuple[float, ...] | None


class ViT(TimmViT):
    """Vision transformer.

    Args:
        position: the encoding, a spec such as "rope" or "sincos+alibi", or an instance; of each block in turn:
            "rope/rope/rope/none", or a list.
        block_position: a further encoding that every block owns; its token term is added before every block.
        img_size: the training size in pixels, H or (H, W): tables are learned on its grid, and policies measure
            other sizes against it. Images of any other size run too. (T, H, W) of videos and volumes (B, C, T, H, W),
            (L,) of lines (B, C, L): then `patch_size` names each axis too. See docs/video.md.
        patch_size: P or (rows, columns), or (frames, rows, columns).
        patch_stride: from patch to patch, at most `patch_size`, its default: smaller, patches overlap, and there are
            more features of the same weights. Places stay in patches of training, whose grid is `img_size` over
            `patch_size`; tables are read between their entries. See docs/dense.md.
        window, global_blocks: all blocks but these attend within windows of so many tokens, a side or one of each
            axis, and `global_blocks` to everything; numbers from 0, or negative from the end. Default: no windows. See
            docs/windows.md.
        window_kind: "tiles": the grid is cut into windows, and those at the edges hold the tokens that are there.
            "zeros": they are filled up with tokens of zeros that are attended to, as in ViTDet and SAM. "around": each
            token attends to the window around it.
        window_tables: whether encodings that blocks in windows own are measured by the window, as tables of ViTDet and
            SAM are, instead of the grid.
        dynamic_img_size: whether other sizes than `img_size` are taken at run time. Off, they are refused.
        dynamic_img_pad: fill images up to a multiple of the patch, below and on the right, instead of refusing them.
        global_pool: "token" (the class token), "avg" (mean over patches), "max", "avgmax" (the mean of both), "map"
            (attention pooling) or "" (all tokens to the head).
        pool_include_prefix: whether all but "token" include leading tokens.
        attn_pool_num_heads, attn_pool_mlp_ratio: of "map"; default: those of the blocks.
        class_token, reg_tokens: leading tokens that have no place.
        norm_layer, norm_eps: of all norms, see `BlockParts`.
        embed_norm: a norm in the patch embedding.
        post_norm: norms after attention and MLP instead of before (`PostNormBlock`).
        pre_norm: a norm before the blocks, and no bias in the patch embedding (CLIP).
        fc_norm: the final norm after pooling instead of before; default as timm: with "avg", "max" and "avgmax".
        final_norm: whether there is a final norm.
        in_chans, num_classes, embed_dim, depth, num_heads: as in timm.
        drop_rate (head), pos_drop_rate, proj_drop_rate, attn_drop_rate, patch_drop_rate, drop_path_rate: as in timm.
        policy, temperature: what the encodings do at other sizes than `img_size`, see `vit2dpe.set_policy`; default:
            what each does by itself.
        device, dtype: of the parameters.
        block: mlp_ratio, mlp_layer, act_layer, qkv_bias, qk_norm, proj_bias, scale_attn_norm, scale_mlp_norm,
            init_values (LayerScale), as in timm; see `BlockParts`.

    Raises:
        ConfigError: for sizes that do not fit each other, an unknown pooling or an unknown encoding.
    """

    def __init__(
        self,
        position: Position = "learned",
        *,
        block_position: Position | None = None,
        img_size: int | tuple[int, ...] = 224,
        patch_size: int | tuple[int, ...] = 16,
        patch_stride: int | tuple[int, ...] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        pool_include_prefix: bool = False,
        attn_pool_num_heads: int | None = None,
        attn_pool_mlp_ratio: float | None = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        class_token: bool = True,
        reg_tokens: int = 0,
        norm_layer: str = "layernorm",
        norm_eps: float = 1e-6,
        embed_norm: bool = False,
        pre_norm: bool = False,
        post_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        window: int | tuple[int, ...] | None = None,
        global_blocks: Sequence[int] = (),
        window_kind: str = "tiles",
        window_tables: bool = False,
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = False,
        policy: str | None = None,
        temperature: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block: Unpack[BlockArguments],
    ) -> None:
        check_arguments({**locals(), **block})
        super().__init__()
        for name in block:
            if name not in BlockArguments.__annotations__:
                known = {*inspect.signature(ViT).parameters, *BlockArguments.__annotations__} - {"block"}
                raise unknown(f"argument of {type(self).__name__}", name, sorted(known), ArgumentError)
        check_pool(global_pool, class_token)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim must be a multiple of num_heads: got {embed_dim} and {num_heads}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool, self.pool_include_prefix = global_pool, pool_include_prefix
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.grad_checkpointing = False
        self.dynamic_img_size, self.dynamic_img_pad = dynamic_img_size, dynamic_img_pad
        norm = norm_factory(norm_layer, norm_eps)
        after = global_pool in ("avg", "max", "avgmax") if fc_norm is None else fc_norm
        make_block = PostNormBlock if post_norm else Block
        axes = axes_of(img_size, patch_size)
        stride = sides(patch_size if patch_stride is None else patch_stride, axes)
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # stochastic depth grows linearly
        with torch.device(device) if device is not None else nullcontext():
            self.patch_embed = PatchEmbed(
                sides(patch_size, axes),
                in_chans,
                embed_dim,
                img_size=sides(img_size, axes),
                bias=not pre_norm,
                norm=norm if embed_norm else None,
                any_size=dynamic_img_size,
                pad=dynamic_img_pad,
                stride=None if stride == sides(patch_size, axes) else stride,
            )
            self.train_grid = self.patch_embed.patches(*self.patch_embed.img_size)
            self.patch_drop = PatchDrop(patch_drop_rate)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
            self.windowing = Windowing.of(
                window, global_blocks, window_kind, window_tables, depth, len(self.train_grid)
            )
            dims = Dims(embed_dim, num_heads, self.train_grid, depth=depth)
            grids = None if self.windowing is None else self.windowing.grids(self.train_grid, depth)
            self.position, own = split_shared_and_per_block(position, dims, block_position, grids)
            if self.windowing is not None:
                self.windowing.check(self.position, own)
            self.pos_drop = nn.Dropout(pos_drop_rate)
            self.norm_pre = norm(embed_dim) if pre_norm else nn.Identity()
            self.blocks = nn.ModuleList(
                make_block(
                    embed_dim,
                    num_heads,
                    norm_layer=norm_layer,
                    norm_eps=norm_eps,
                    position=own[i],
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    drop_path=rates[i],
                    **block,
                )
                for i in range(depth)
            )
            self.norm = norm(embed_dim) if final_norm and not after else nn.Identity()
            self.attn_pool = None
            if global_pool == "map":
                self.attn_pool = AttentionPoolLatent(
                    embed_dim,
                    num_heads=attn_pool_num_heads or num_heads,
                    mlp_ratio=attn_pool_mlp_ratio or block.get("mlp_ratio", 4.0),
                    norm_layer=norm,
                    act_layer=ACTS[block.get("act_layer", "gelu")],
                )
            self.fc_norm = norm(embed_dim) if final_norm and after else nn.Identity()
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.feature_info = [
            FeatureInfo(
                module=f"blocks.{i}",
                num_chs=embed_dim,
                reduction=max(self.patch_embed.stride or self.patch_embed.patch_size),
            )
            for i in range(depth)
        ]
        self.init_weights(needs_reset=False)
        self.to(dtype=dtype)
        self.take_policy(policy, temperature)
        nn.Module.register_load_state_dict_pre_hook(self, convert_state_dict)

    save_card = save_card

    @overload
    def forward_features(
        self,
        images: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        token_filter: TokenFilter | None = None,
        spacing: Spacing = None,
    ) -> Tensor: ...
    @overload
    def forward_features(
        self,
        images: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        token_filter: TokenFilter | None = None,
        spacing: Spacing = None,
    ) -> Tokens: ...
    def forward_features(
        self,
        images: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        token_filter: TokenFilter | None = None,
        spacing: Spacing = None,
    ) -> Tokens:
        """(B, C, H, W) -> (B, prefix + N, D), normalised where the norm comes before pooling; see `embed`.

        Of images of different sizes, see `mixed.py`: a list of them gives a list of (prefix + N_i, D); a padded batch
        a dict as timm's NaFlexViT, `patches` (B, prefix + N, D) and `patch_valid` (B, N). `forward_head` takes either.

        Args:
            attn_mask: which tokens may attend to which, leading ones included: (N, N) or (B|1, H|1, N|1, N), boolean
                (True may attend), or floats that are added to the logits. A token that may attend to none gets 0 from
                attention, as in torch.
            is_causal: tokens attend to those before them, leading tokens first, then row by row; together with a mask,
                where both allow it (timm takes one of them).
        """
        batch = images if isinstance(images, Tensor) else read(images, self.patch_embed)
        x, signal, at = self.embed(batch, token_filter, spacing)
        views: list[View] = []
        if not isinstance(batch, Tensor) or attn_mask is not None or is_causal or self.windowing is not None:
            # From this file, in which torch.fx takes it for a leaf.
            signal, mask = allow(x, signal, at, attn_mask, is_causal, self.num_heads, batch)
            views = self.views(x, signal, at, mask)
        x = run_blocks(self.blocks, x, signal, at, views, recompute=self.grad_checkpointing)
        out: Tensor = self.norm(x)
        return given_back(batch, out, at) if isinstance(batch, Padded | Packed) else out

    def embed(
        self, images: Images, token_filter: TokenFilter | None = None, spacing: Spacing = None
    ) -> tuple[Tensor, Signal, Positions]:
        """Tokens at the input of the first block, the shared Signal, and where the tokens are.

        `token_filter` is applied to patches and their places first (masked pretraining), instead of `patch_drop`.
        `spacing` is the size of a pixel in the world over that of training, see `Positions.grid`.
        """
        batch = images if isinstance(images, Tensor) else read(images, self.patch_embed)
        if isinstance(batch, Packed):  # (1, all tokens of all images, D)
            x, at = laid_out([self._tokens(one, token_filter, spacing) for one in batch.images])
        else:
            x, at = self._tokens(batch, token_filter, spacing)  # (B, prefix + N, D)
        x, signal = block_inputs(x, self.position(at))  # geometry becomes tensors, once
        return self.norm_pre(self.pos_drop(x)), signal, at

    def _tokens(
        self, images: Tensor | Padded, token_filter: TokenFilter | None, spacing: Spacing
    ) -> tuple[Tensor, Positions]:
        """Patches behind leading tokens, (B, prefix + N, D), and where they are."""
        if isinstance(images, Padded):
            x, at = embed_patches(self.patch_embed, images)
        else:
            x, at = self.patch_embed(images)  # (B, N, D)
        at = at if spacing is None else spaced(at, spacing)  # a leaf of torch.fx, whose graphs have a spacing
        if token_filter is not None or not isinstance(images, Padded):
            x, at = (token_filter or self.patch_drop)(x, at)
        else:
            x, at = drop_patches(self.patch_drop, x, at)
        at = at.with_prefix(self.num_prefix_tokens)
        return self._prepend(x), at

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives -> (B, classes); the features before the classifier with `pre_logits`."""
        if isinstance(x, dict):
            found = self.pool(x["patches"], valid=x["patch_valid"])
        elif isinstance(x, list):
            if self.global_pool == "":
                raise ConfigError(
                    "without pooling (global_pool='') images of different sizes have tokens of different numbers: "
                    "forward_features gives those of each, and a padded batch runs"
                )
            found = torch.cat([self.pool(one[None]) for one in x])
        else:
            found = self.pool(x)
        out: Tensor = self.head_drop(self.fc_norm(found))
        return out if pre_logits else self.head(out)

    def forward(
        self,
        images: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        spacing: Spacing = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, classes); masks as in `forward_features`.

        Args:
            images: or images of different sizes: a list of (C, H_i, W_i), timm's NaFlex batch, a padded batch, see
                `mixed.py`. Each gives what it gives alone.
            spacing: the size of a pixel in the world over that of training, one number or (rows, columns): 0.5 for
                images of 0.5 m a pixel where the model was trained at 1 m. Tokens then stand where they are in the
                world of training. Default 1.

        Raises:
            ValueError: for a spacing other than 1 where an encoding takes whole places alone.
        """
        return self.forward_head(self.forward_features(images, attn_mask, is_causal, spacing=spacing))

    def pool(self, x: Tensor, pool_type: str | None = None, valid: Tensor | None = None) -> Tensor:
        """(B, prefix + N, D) -> (B, D), or as it is with ""; `pool_type` is another pooling without parameters.

        Args:
            valid: (B, N) bool, which patches are one, in a padded batch.
        """
        kind = self.global_pool if pool_type is None or self.attn_pool is not None else pool_type
        if pool_type is not None and (kind not in POOLS or (kind == "map" and self.attn_pool is None)):
            raise unknown("pool_type", kind, [name for name in POOLS if name != "map"])
        if kind == "token":
            return x[:, 0]
        if kind == "":
            return x
        prefix = self.num_prefix_tokens
        x = x if self.pool_include_prefix else x[:, prefix:]
        if valid is not None:
            own = F.pad(valid, (prefix, 0), value=True) if self.pool_include_prefix else valid
            return pooled(x, kind, own) if self.attn_pool is None else attention_pooled(self.attn_pool, x, own)
        if kind == "max":
            return x.amax(dim=1)
        if kind == "avgmax":
            return (x.amax(dim=1) + x.mean(dim=1)) / 2
        return x.mean(dim=1) if self.attn_pool is None else self.attn_pool(x)

    def prefix_tokens(self) -> dict[str, nn.Parameter]:
        """The leading tokens by name, in their order."""
        tokens = {"cls_token": self.cls_token, "reg_token": self.reg_token}
        return {name: token for name, token in tokens.items() if token is not None}

    def _prepend(self, x: Tensor) -> Tensor:
        prefix = [token.expand(x.shape[0], -1, -1) for token in self.prefix_tokens().values()]
        return torch.cat([*prefix, x], dim=1) if prefix else x
