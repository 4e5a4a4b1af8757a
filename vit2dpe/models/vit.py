"""The vision transformer, with any encoding: image -> patches -> blocks -> logits.

Parameter names and constructor arguments are timm's (`timm/models/vision_transformer.py`), so weights go both ways.
Sources: ViT, arXiv 2010.11929; registers, arXiv 2309.16588. How ours differs: the encoding is an argument, any height
and width that the patch divides is taken at run time, and the class token owns no row of a position table.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..encodings import Dims, PositionEncoding, assign
from ..errors import ConfigError, unknown
from ..layers import Block, PatchEmbed, add_token
from ..positions import Positions
from .weights import accept_timm_names

POOLS = ("token", "avg", "map", "")


class ViT(nn.Module):
    """Vision transformer.

    Args:
        position: the encoding, a word such as "rope" or "sincos+alibi", or an instance.
        block_position: a further encoding that every block owns; its token term is added before every block.
        img_size: the training size in pixels, H or (H, W): tables are learned on its grid, and policies measure
            other sizes against it. Images of any other size run too.
        patch_size: P or (rows, columns).
        global_pool: "token" (the class token), "avg" (mean over patches), "map" (attention pooling) or ""
            (all tokens to the head).
        class_token, reg_tokens: leading tokens that have no place.
        fc_norm: norm after pooling instead of before; default as timm: with "avg".
        qkv_bias, qk_norm, mlp_ratio, init_values (LayerScale), drop_rate (head), pos_drop_rate, proj_drop_rate,
            attn_drop_rate, drop_path_rate: as in timm.

    Raises:
        ConfigError: for sizes that do not fit each other, an unknown pooling or an unknown encoding.
    """

    def __init__(
        self,
        position: str | PositionEncoding = "learned",
        *,
        block_position: str | PositionEncoding | None = None,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        class_token: bool = True,
        reg_tokens: int = 0,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_pool(global_pool, class_token)
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim must be a multiple of num_heads: got {embed_dim} and {num_heads}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(_pair(patch_size), in_chans, embed_dim)
        self.train_grid = self.patch_embed.grid(*_pair(img_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        dims = Dims(embed_dim, num_heads, self.train_grid, depth=depth)
        self.position, own = assign(position, dims, block_position)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        block = partial(
            Block,
            embed_dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            init_values=init_values,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # stochastic depth grows linearly
        self.blocks = nn.ModuleList(block(position=own[i], drop_path=rates[i]) for i in range(depth))
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=self.patch_embed.patch_size[0])
            for i in range(depth)
        ]
        after = global_pool == "avg" if fc_norm is None else fc_norm
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.norm = nn.Identity() if after else norm(embed_dim)
        self.attn_pool = (
            AttentionPoolLatent(embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, norm_layer=norm)
            if global_pool == "map"
            else None
        )
        self.fc_norm = norm(embed_dim) if after else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)
        self.register_load_state_dict_pre_hook(accept_timm_names)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Truncated normal 0.02 for linear maps with zero biases, as timm does; encodings draw their own.

        With `needs_reset` every submodule draws its parameters anew first, as after a build on the meta device.
        """
        own = tuple(f"{name}." for name, part in self.named_modules() if isinstance(part, PositionEncoding))
        for name, module in self.named_modules():
            if needs_reset and name and hasattr(module, "reset_parameters") and not name.startswith(own):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and not name.startswith(own):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, prefix + N, D), normalised where the norm comes before pooling."""
        x, at = self.patch_embed(images)
        x, at = self._prepend(x), at.with_prefix(self.num_prefix_tokens)
        signal = self.position(at)  # geometry becomes tensors, once
        x = self.pos_drop(add_token(x, signal))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                x = checkpoint(block, x, signal, at, use_reentrant=False)
            else:
                x = block(x, signal, at)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, prefix + N, D) -> (B, classes); the features before the classifier with `pre_logits`."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def pool(self, x: Tensor) -> Tensor:
        if self.attn_pool is not None:
            return self.attn_pool(x)
        if self.global_pool == "token":
            return x[:, 0]
        if self.global_pool == "avg":
            return x[:, self.num_prefix_tokens :].mean(dim=1)
        return x

    def _prepend(self, x: Tensor) -> Tensor:
        prefix = [token for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1) if prefix else x

    def positions(self, height: int, width: int, device: torch.device | str | None = None) -> Positions:
        """Where the tokens of an image of this size are, prefix included: what `position` is called with."""
        return Positions.grid(self.patch_embed.grid(height, width), device).with_prefix(self.num_prefix_tokens)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _check_pool(global_pool, self.cls_token is not None)
            if global_pool == "map" and self.attn_pool is None:
                raise ConfigError("global_pool='map' has parameters of its own: build the model with it")
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Full names of tokens, tables and frequencies."""
        tokens = {"cls_token", "reg_token"}
        inside = {name for name, module in self.named_modules() if isinstance(module, PositionEncoding)}
        return tokens | {
            f"{owner}.{name}" for owner in inside for name, _ in self.get_submodule(owner).named_parameters()
        }

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer-decay groups: stem, blocks, the rest; a block's own encoding is in its block."""
        return dict(
            stem=r"^cls_token|^reg_token|^patch_embed|^position",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm|^attn_pool", (99999,))],
        )


def _check_pool(global_pool: str, class_token: bool) -> None:
    if global_pool not in POOLS:
        raise unknown("global_pool", global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ConfigError("global_pool='token' needs class_token=True; use 'avg' to pool over patches")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
