"""timm's interface of our models: features, classifier, sizes, optimizer groups, initialisation.

Signatures are timm's (`timm/models/vision_transformer.py`); the forward passes are in the files of the models.

    TimmModel   the common part of ViT and Swin
    TimmViT     the part of ViT; that of Swin is in `swin/timm_api.py`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch
from timm.models import get_model_args

# timm's public names read its record of a model (get_model_args, get_model_traits); none writes it.
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn

from ..data.prepare import Picture, Prediction
from ..encodings import PositionEncoding, encoding_parameters, modules_outside_encodings, named_encodings
from ..encodings.along import extent_of
from ..errors import ConfigError, unknown
from ..positions import Positions
from ..resolution.apply import kept_policy, policies_of, set_policy
from ..spec import Size
from .arguments import sides
from .features import Features, take_indices
from .layers import PatchEmbed
from .predict import class_names, predict, preparation_for

POOLS = ("token", "avg", "max", "avgmax", "map", "")
ImageSize = int | Sequence[int]  # a side, or (height, width); of other axes one of each
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
    crop_pct: float
    label_names: Sequence[str]
    notes: Sequence[str]
    num_classes: int
    first_conv: str | tuple[str, ...]
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
    train_grid: tuple[int, ...]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    num_prefix_tokens: int
    global_pool: str
    pretrained_cfg: PretrainedCfg
    default_cfg: PretrainedCfg  # the same, under timm's older name

    def predict(
        self,
        images: Picture | Sequence[Picture],
        k: int = 5,
        *,
        size: Size | None = None,
        batch_size: int = 64,
        spacing: float | None = None,
        fit: str | None = None,
        max_tokens: int | None = None,
    ) -> Prediction | list[Prediction]:
        """The k likeliest classes of an image, by name, and their probabilities; of several images a list of them.

        Images are prepared as `vit2dpe evaluate` does it: see `vit2dpe.data.prepare.Preparation`. The mode of the model
        is left alone.

        Args:
            images: a path, an image of Pillow's, a uint8 array or tensor (height, width, 3), or a list of them.
            size: (H, W) that the model gets; default its own. What encodings do at another one is `use_policy`'s.
            batch_size: images at a time.
            spacing: the size of a pixel in the world over that of training, of images at `size`; of a ViT.
            fit: "native": each keeps its aspect ratio and has at most `max_tokens` patches, by default as many as an
                image of the model's own size; of a ViT.

        Raises:
            DataError: for a file that cannot be read.
            ConfigError: for what is no image, and for a model without classes.
        """
        prepare = preparation_for(self, size, fit, max_tokens, spacing)
        return predict(self, images, k, prepare, class_names(self), batch_size, spacing)

    def positions(
        self, height: ImageSize, width: int | None = None, device: torch.device | str | None = None
    ) -> Positions:
        """Positions of the tokens of an image of this size, prefix included; the argument of `position`.

        Args:
            height, width: of an image; or one sequence of all sides, (frames, rows, columns).
        """
        size = height if width is None else (height, width)
        extent = self.patch_embed.grid(*sides(size, len(self.train_grid)))  # type: ignore[arg-type]
        return self.patch_embed.places(extent, device).with_prefix(self.num_prefix_tokens)

    def train_extent(self, encoding: PositionEncoding) -> tuple[int, ...]:
        """The extent that an encoding of this model was trained on."""
        return extent_of(encoding, self.train_grid)

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

    def change_patch(self, size: tuple[int, ...], patch_size: ImageSize | None) -> tuple[int, ...]:
        """The grid of an image of this size in these patches (None: the model's), which become the model's.

        Raises:
            ConfigError: if the patch does not divide the size; the model is then as it was.
        """
        embed, before = self.patch_embed, self.patch_embed.patch_size
        embed.patch_size = before if patch_size is None else sides(patch_size, len(size))
        try:
            grid = embed.patches(*size)
        finally:
            patch, embed.patch_size = embed.patch_size, before
        if patch != before:
            embed.resample(patch)
            for level in self.feature_info:
                if embed.stride is None:
                    level["reduction"] = level["reduction"] * max(patch) // max(before)
        return grid

    def resize_encodings(self) -> None:
        """Resize tables for good to the extents that the model now names."""
        for encoding in named_encodings(self).values():
            encoding.set_grid(self.train_extent(encoding))

    def record_size(self, patch_size: ImageSize | None, window_size: Sequence[tuple[int, int]] | None = None) -> None:
        """Bring timm's record of the model's size up to date, for its data config and for saving.

        timm has records of images alone.
        """
        if len(self.train_grid) != 2:
            return
        patch = None if patch_size is None else self.patch_embed.patch_size
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch, window_size=window_size)

    def record_arguments(self, **arguments: Any) -> None:
        """Put arguments into timm's record of the model, which it is saved with and built again from."""
        update_model_args(self, **arguments)

    def record_policy(
        self,
        policy: str,
        temperature: str | None,
        extents: Sequence[tuple[int, ...]],
        usual: bool = True,
        whole: bool = True,
    ) -> None:
        """Keep a policy where the model is saved from: in the record of one that came from timm, else as `policy`.

        Args:
            temperature: with it.
            extents: of each part of the model (`position_groups`), what the policy measures from.
            usual: whether those are what the parts were trained on; an argument `policy` measures from nothing else.
            whole: whether every encoding takes it; those that do not go on as before.
        """
        arguments = get_model_args(self)
        record = arguments.get("record")
        if record is None:
            before = arguments.get("policy")
            joined = policy if whole or not before else f"{policy}+{before}"
            self.record_arguments(policy=joined if usual else None, temperature=temperature if usual else None)
            return
        kept, where = list(record["policies"]), [list(extent) for extent in extents]
        for word, factor in [*_beside_record(arguments), (policy, temperature)]:
            entry = [word, where, *([factor] if factor else [])]
            kept = [*(p for p in kept if p != entry), entry]
        taken_in = dict.fromkeys({"policy", "temperature"} & arguments.keys())
        update_model_args(self, record=record | dict(policies=kept), **taken_in)

    def measure_policy(self) -> None:
        """Have the model's own policy measure from the size that the model now has; one that timm's weights came with
        goes on as it was."""
        arguments = get_model_args(self)
        if arguments.get("policy") and "record" not in arguments:
            self.take_policy(arguments["policy"], arguments.get("temperature"))

    def take_policy(self, policy: str | None, temperature: str | None) -> None:
        """The arguments `policy` and `temperature` of a constructor: `set_policy`, where they are given."""
        if policy is not None:
            set_policy(self, policy, temperature=temperature)
        elif temperature is not None:
            raise ConfigError(f"temperature {temperature!r} goes with a policy: give policy= too")


class Step(Protocol):
    """A step between timm's parameters and ours, which changes a state_dict in place."""

    def into(self, state: dict[str, Tensor]) -> None: ...

    def back(self, state: dict[str, Tensor]) -> None: ...


class TimmViT(Features, TimmModel):
    """timm's interface of a ViT: one stage of blocks, leading tokens, pooling by the model."""

    timm_steps: Sequence[Step] | None = None  # set by `from_timm`, read by `to_timm`
    fc_norm: nn.Module
    attn_pool: nn.Module | None
    reg_token: nn.Parameter | None
    embed_dim: int
    no_embed_class = True  # timm: position tables have no rows for leading tokens

    def take_policy(self, policy: str | None, temperature: str | None) -> None:
        super().take_policy(policy, temperature)
        self.read_between()

    def measure_policy(self) -> None:
        super().measure_policy()
        self.read_between()

    def prefix_tokens(self) -> dict[str, nn.Parameter]:
        """The leading tokens by name, in their order."""
        raise TypeError(f"{type(self).__name__} must name its leading tokens")

    @property
    def has_class_token(self) -> bool:
        return self.cls_token is not None

    @property
    def num_reg_tokens(self) -> int:
        return 0 if self.reg_token is None else self.reg_token.shape[1]

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
        """A new head of `num_classes` (0: none), and another pooling if named.

        Its parameters are new, as in timm: an optimizer is made afterwards.
        """
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

        Not needed to run another size. Parameters stay the objects that they are, so that an optimizer made before goes
        on training them; where it has moments of the old shape, torch refuses its next step.

        Args:
            img_size: pixels, H or (H, W), or one of each axis, frames first; None keeps it.
            patch_size: another patch, P or (rows, columns), or one of each axis: its kernel is resampled as
                `from_timm` does, and the grid is that of the size in such patches.
        """
        if img_size is None and patch_size is None:
            return
        size = self.patch_embed.img_size if img_size is None else sides(img_size, len(self.train_grid))
        self.train_grid = self.change_patch(size, patch_size)
        self.patch_embed.img_size = size
        self.resize_encodings()
        self.record_size(patch_size)
        self.measure_policy()

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


def recorded_policies(model: nn.Module) -> list[tuple[str, str | None]]:
    """What `set_policy` made a model's own, in order: policy of the encodings, and temperature."""
    if (kept := kept_policy(model)) is not None:
        return [kept]
    arguments = get_model_args(model)
    if "record" in arguments:
        kept = arguments["record"]["policies"]
        found = [(policy, factor[0] if factor else None) for policy, _, *factor in kept]
        return [*found, *_beside_record(arguments)]
    policy = arguments.get("policy")
    return [] if policy is None else [(policy, arguments.get("temperature"))]


def _beside_record(arguments: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """The policy that a model was built with beside a record, which is followed after those of the record."""
    policy = None if "policy" in arguments["record"]["asked"] else arguments.get("policy")
    return [] if policy is None else [(policy, arguments.get("temperature"))]


def every_policy(model: nn.Module) -> tuple[str, ...]:
    """What a model is measured under: "default" first, where `set_policy` made something its own, and `policies_of`."""
    return ("default",) * bool(recorded_policies(model)) + policies_of(model)


def pretrained_cfg_of(model: nn.Module) -> PretrainedCfg:
    """timm's record of a model; empty where there is none."""
    cfg: PretrainedCfg | None = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, dict) else {}


def check_pool(global_pool: str, class_token: bool) -> None:
    if global_pool not in POOLS:
        raise unknown("global_pool", global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ConfigError("global_pool='token' needs class_token=True; use 'avg' to pool over patches")


def pair(size: ImageSize) -> tuple[int, int]:
    """(rows, columns) of one number or two.

    Raises:
        ConfigError: for anything else.
    """
    rows, columns = sides(size)
    return rows, columns
