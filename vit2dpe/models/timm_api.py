"""What timm's tools and users do with a timm model, for those made of `patch_embed`, `position`, `blocks`, `head`.

Signatures are timm's (`timm/models/vision_transformer.py`); what a model computes is in its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..encodings import PositionEncoding, encoding_parameters, modules_outside_encodings, named_encodings
from ..errors import ConfigError, unknown
from ..positions import Positions
from ..signal import Signal
from .card import save_card
from .layers import PatchEmbed

POOLS = ("token", "avg", "map", "")


class TimmViT(nn.Module):
    """Features, classifier, optimizer groups and sizes, as timm's tools ask for them."""

    patch_embed: PatchEmbed
    position: PositionEncoding
    blocks: nn.ModuleList
    norm: nn.Module
    fc_norm: nn.Module
    head: nn.Module
    attn_pool: nn.Module | None
    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    train_grid: tuple[int, int]
    num_classes: int
    num_prefix_tokens: int
    embed_dim: int
    global_pool: str
    grad_checkpointing: bool
    save_card = save_card

    def embed(self, images: Tensor) -> tuple[Tensor, Signal, Positions]:
        """Tokens at the input of the first block, the shared Signal, and where the tokens are."""
        raise TypeError(f"{type(self).__name__} must say how it embeds images")

    def prefix_tokens(self) -> dict[str, nn.Parameter]:
        """The leading tokens by name, in their order."""
        tokens = {"cls_token": self.cls_token, "reg_token": self.reg_token}
        return {name: token for name, token in tokens.items() if token is not None}

    def run_block(self, block: nn.Module, x: Tensor, signal: Signal, at: Positions) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, signal, at, use_reentrant=False)
        return block(x, signal, at)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Outputs of chosen blocks beside the final features.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks, a list of blocks (negative from the end), or None for all.
            return_prefix_tokens: give prefix tokens too, as pairs (patches, prefix).
            norm: put the final norm on each of them.
            stop_early: run no block after the last one asked for.
            output_fmt: "NCHW", (B, D, rows, columns), or "NLC", (B, N, D).
            intermediates_only: leave the final features out.
            output_dict: a dict `image_intermediates`, `image_intermediates_prefix`, `image_features`.

        Returns:
            (final features, [intermediates]), the list alone, or the dict.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.grid(x.shape[-2], x.shape[-1])
        x, signal, at = self.embed(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self.run_block(block, x, signal, at)
            if i in take:
                found.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in found]
        patches = [y[:, self.num_prefix_tokens :] for y in found]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else result | {"image_features": self.norm(x)}
        listed: list[Any] = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return listed if intermediates_only else (self.norm(x), listed)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one asked for, and norm and head if wanted; returns the kept indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.attn_pool = None
            self.num_classes, self.global_pool, self.head = 0, "", nn.Identity()
        return take

    def positions(self, height: int, width: int, device: torch.device | str | None = None) -> Positions:
        """Where the tokens of an image of this size are, prefix included: what `position` is called with."""
        return Positions.grid(self.patch_embed.grid(height, width), device).with_prefix(self.num_prefix_tokens)

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The extent that an encoding of this model was trained on."""
        return self.train_grid

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of `num_classes` (0: none), and another pooling if named."""
        if global_pool is not None:
            check_pool(global_pool, self.cls_token is not None)
            if global_pool == "map" and self.attn_pool is None:
                raise ConfigError("global_pool='map' has parameters of its own: build the model with it")
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
            # Where the norm stands follows from the first pooling; a model built from timm's record must agree.
            _record("update_model_args", self, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype).train(self.training)
            if num_classes > 0
            else nn.Identity()
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int] | None = None, patch_size: Any = None) -> None:
        """Make another size the model's own: tables are resized for good, and policies measure from there.

        Not needed to run another size.

        Args:
            img_size: pixels, H or (H, W); None keeps it.
            patch_size: another patch, P or (rows, columns): its kernel is resampled as `from_timm` does, and the grid
                is that of the size in such patches.
        """
        if img_size is None and patch_size is None:
            return
        size = self.patch_embed.img_size if img_size is None else pair(img_size)
        self.train_grid = change_patch(self, size, patch_size)
        self.patch_embed.img_size = size
        for encoding in named_encodings(self).values():
            encoding.set_grid(self.train_grid)
        patch = None if patch_size is None else self.patch_embed.patch_size
        _record("update_model_input_size", self, size, patch_size=patch)

    def no_weight_decay(self) -> set[str]:
        """Full names of tokens, tables and frequencies."""
        return {"cls_token", "reg_token"} | encoding_parameters(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer-decay groups: stem, blocks, the rest; a block's own encoding is in its block."""
        return dict(
            stem=r"^cls_token|^reg_token|^dist_token|^patch_embed|^position|^norm_pre",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm|^attn_pool", (99999,))],
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Truncated normal 0.02 for linear maps with zero biases, as timm does; encodings draw their own.

        With `needs_reset` every submodule draws its parameters anew first, as after a build on the meta device.
        """
        for name, module in modules_outside_encodings(self):
            if needs_reset and name and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("cls_token", "reg_token", "dist_token"):
            if (token := getattr(self, name, None)) is not None:
                nn.init.normal_(token, std=1e-6)


def change_patch(model: Any, size: Any, patch_size: int | Sequence[int] | None) -> tuple[int, int]:
    """The grid of an image of this size in these patches (None: the model's), which become the model's.

    Raises:
        ConfigError: if the patch does not divide the size; the model is then as it was.
    """
    embed, before = model.patch_embed, model.patch_embed.patch_size
    embed.patch_size = before if patch_size is None else pair(patch_size)
    try:
        grid = embed.grid(*size)
    finally:
        patch, embed.patch_size = embed.patch_size, before
    if patch != before:
        embed.resample(patch)
        for level in model.feature_info:
            level["reduction"] = level["reduction"] * max(patch) // max(before)
    return grid


def _record(what: str, *args: Any, **kwargs: Any) -> None:
    """Bring timm's record of a model up to date (for its data config and for saving), where this timm keeps one."""
    try:
        from timm.models import _input
    except ImportError:
        return
    getattr(_input, what)(*args, **kwargs)


def check_pool(global_pool: str, class_token: bool) -> None:
    if global_pool not in POOLS:
        raise unknown("global_pool", global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ConfigError("global_pool='token' needs class_token=True; use 'avg' to pool over patches")


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
