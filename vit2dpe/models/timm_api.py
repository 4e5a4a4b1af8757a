"""timm's interface of our models: features, classifier, sizes, optimizer groups, initialisation.

Signatures are timm's (`timm/models/vision_transformer.py`); the forward passes are in the files of the models.

    TimmModel   the common part of ViT and Swin
    TimmViT     the part of ViT; that of Swin is in `swin/timm_api.py`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import torch
from timm.models import get_model_args

# timm's public names read its record of a model (get_model_args, get_model_traits); none writes it.
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from ..encodings import PositionEncoding, encoding_parameters, modules_outside_encodings, named_encodings
from ..errors import ConfigError, unknown
from ..positions import Positions
from ..signal import Signal
from .layers import PatchEmbed, run_block

POOLS = ("token", "avg", "map", "")
ImageSize = int | Sequence[int]  # a side, or (height, width)
Groups = dict[str, str | list[tuple[str, tuple[int, ...] | None]]]  # of layer decay: regular expressions, and order


class PretrainedCfg(TypedDict, total=False):
    """The entries of a model's `pretrained_cfg` (timm's record of its weights) that are used here."""

    architecture: str
    tag: str
    license: str
    hf_hub_id: str
    file: str
    input_size: tuple[int, int, int]
    fixed_input_size: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    first_conv: str
    classifier: str | tuple[str, ...]


class FeatureInfo(TypedDict):
    """An entry of timm's `feature_info`: module of the output, its channels, pixels a token covers along an axis."""

    module: str
    num_chs: int
    reduction: int


class TimmModel(nn.Module):
    """The common part of ViT and Swin: positions, optimizer groups, initialisation, another size."""

    patch_embed: PatchEmbed
    position: PositionEncoding
    norm: nn.Module
    head: nn.Module
    feature_info: list[FeatureInfo]
    train_grid: tuple[int, int]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    num_prefix_tokens: int
    global_pool: str
    pretrained_cfg: PretrainedCfg
    default_cfg: PretrainedCfg  # the same, under timm's older name

    def positions(self, height: int, width: int, device: torch.device | str | None = None) -> Positions:
        """Positions of the tokens of an image of this size, prefix included; the argument of `position`."""
        return Positions.grid(self.patch_embed.grid(height, width), device).with_prefix(self.num_prefix_tokens)

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The extent that an encoding of this model was trained on."""
        return self.train_grid

    def no_weight_decay(self) -> set[str]:
        """Full names of tokens, of the encodings' parameters, and of the factors of cosine attention."""
        factors = {name for name, _ in self.named_parameters() if name.endswith(".logit_scale")}
        return encoding_parameters(self) | factors

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

    def change_patch(self, size: tuple[int, int], patch_size: ImageSize | None) -> tuple[int, int]:
        """The grid of an image of this size in these patches (None: the model's), which become the model's.

        Raises:
            ConfigError: if the patch does not divide the size; the model is then as it was.
        """
        embed, before = self.patch_embed, self.patch_embed.patch_size
        embed.patch_size = before if patch_size is None else pair(patch_size)
        try:
            grid = embed.grid(*size)
        finally:
            patch, embed.patch_size = embed.patch_size, before
        if patch != before:
            embed.resample(patch)
            for level in self.feature_info:
                level["reduction"] = level["reduction"] * max(patch) // max(before)
        return grid

    def resize_encodings(self) -> None:
        """Resize tables for good to the extents that the model now names."""
        for encoding in named_encodings(self).values():
            encoding.set_grid(self.train_extent(encoding))

    def record_size(self, patch_size: ImageSize | None, window_size: Sequence[tuple[int, int]] | None = None) -> None:
        """Bring timm's record of the model's size up to date, for its data config and for saving."""
        patch = None if patch_size is None else self.patch_embed.patch_size
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch, window_size=window_size)

    def record_arguments(self, **arguments: Any) -> None:
        """Put arguments into timm's record of the model, which it is saved with and built again from."""
        update_model_args(self, **arguments)

    def record_policy(self, policy: str, extents: Sequence[tuple[int, ...]]) -> None:
        """Keep a policy in timm's record, where that has a place for it: of models that came from timm.

        Args:
            extents: of each part of the model (`position_groups`), what the policy measures from.
        """
        record = get_model_args(self).get("record")
        if record is not None:
            entry = [policy, [list(extent) for extent in extents]]
            update_model_args(
                self, record=record | dict(policies=[*(p for p in record["policies"] if p != entry), entry])
            )


class Step(Protocol):
    """A step between timm's parameters and ours, which changes a state_dict in place."""

    def into(self, state: dict[str, Tensor]) -> None: ...

    def back(self, state: dict[str, Tensor]) -> None: ...


class TimmViT(TimmModel):
    """timm's interface of a ViT: one stage of blocks, leading tokens, pooling by the model."""

    timm_steps: Sequence[Step] | None = None  # set by `from_timm`, read by `to_timm`
    blocks: nn.ModuleList
    fc_norm: nn.Module
    attn_pool: nn.Module | None
    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    embed_dim: int
    grad_checkpointing: bool

    def embed(self, images: Tensor) -> tuple[Tensor, Signal, Positions]:
        """Tokens at the input of the first block, the shared Signal, and where the tokens are."""
        raise TypeError(f"{type(self).__name__} must define embed")

    def prefix_tokens(self) -> dict[str, nn.Parameter]:
        """The leading tokens by name, in their order."""
        raise TypeError(f"{type(self).__name__} must name its leading tokens")

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Intermediates | tuple[Tensor, Intermediates] | dict[str, Tensor | list[Tensor]]:
        """Outputs of chosen blocks beside the final features.

        Args:
            x: images (B, C, H, W).
            indices: the last n blocks, a list of blocks (negative from the end), or None for all.
            return_prefix_tokens: give prefix tokens too, as pairs (patches, prefix).
            norm: put the final norm on each of them.
            stop_early: run no block after the last chosen one.
            output_fmt: "NCHW", (B, D, rows, columns), or "NLC", (B, N, D).
            intermediates_only: leave the final features out.
            output_dict: a dict `image_intermediates`, `image_intermediates_prefix`, `image_features`.

        Returns:
            (final features, [intermediates]), the list alone, or the dict.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = take_indices(len(self.blocks), indices)
        grid = self.patch_embed.grid(x.shape[-2], x.shape[-1])
        x, signal, at = self.embed(x)
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = run_block(block, x, signal, at, recompute=self.grad_checkpointing)
            if i in take:
                outputs.append(self.norm(x) if norm else x)
        prefix = [y[:, : self.num_prefix_tokens] for y in outputs]
        patches = [y[:, self.num_prefix_tokens :] for y in outputs]
        if output_fmt == "NCHW":
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]  # (B, D, rows, columns)
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result: dict[str, Tensor | list[Tensor]] = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else result | {"image_features": self.norm(x)}
        listed: Intermediates = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return listed if intermediates_only else (self.norm(x), listed)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last chosen one, and norm and head if wanted; returns the kept indices."""
        take, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.attn_pool = None
            self.num_classes, self.global_pool, self.head = 0, "", nn.Identity()
        return take

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
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
            self.record_arguments(fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        self.head = self.new_head(num_classes)

    def new_head(self, num_classes: int) -> nn.Module:
        """A linear classifier where the patch embedding is, in its dtype; nothing for no classes."""
        if num_classes <= 0:
            return nn.Identity()
        like = self.patch_embed.proj.weight
        return nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: ImageSize | None = None, patch_size: ImageSize | None = None) -> None:
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
        self.train_grid = self.change_patch(size, patch_size)
        self.patch_embed.img_size = size
        self.resize_encodings()
        self.record_size(patch_size)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "reg_token"} | super().no_weight_decay()

    def group_matcher(self, coarse: bool = False) -> Groups:
        """Layer-decay groups: stem, blocks, the rest; a block's own encoding is in its block."""
        return dict(
            stem=r"^cls_token|^reg_token|^dist_token|^patch_embed|^position|^norm_pre",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm|^fc_norm|^attn_pool", (99999,))],
        )

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """As `TimmModel`'s; leading tokens from N(0, 1e-6²), as in timm."""
        super().init_weights(mode, needs_reset)
        for name in ("cls_token", "reg_token", "dist_token"):
            if (token := getattr(self, name, None)) is not None:
                nn.init.normal_(token, std=1e-6)


Intermediates = list[Tensor] | list[tuple[Tensor, Tensor]]  # patches, or (patches, prefix)


def pretrained_cfg_of(model: nn.Module) -> PretrainedCfg:
    """timm's record of a model; empty where there is none."""
    cfg: PretrainedCfg | None = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, dict) else {}


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The chosen of `count` layers, counted from 0, and the last of them.

    Args:
        indices: the last n layers, a list of layers (negative from the end), or None for all.

    Raises:
        ConfigError: for a layer that the model has not.
    """
    if isinstance(indices, int):
        chosen = list(range(count - indices, count))
    else:
        chosen = list(range(count)) if indices is None else [i + count if i < 0 else i for i in indices]
    if not chosen or not 0 <= min(chosen) <= max(chosen) < count:
        raise ConfigError(f"layers are numbered from 0 to {count - 1}, or -{count} to -1: got {indices}")
    return chosen, max(chosen)


def check_pool(global_pool: str, class_token: bool) -> None:
    if global_pool not in POOLS:
        raise unknown("global_pool", global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ConfigError("global_pool='token' needs class_token=True; use 'avg' to pool over patches")


def pair(size: ImageSize) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
