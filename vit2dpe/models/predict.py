"""What a classifier says to pictures: `predict` of our models, and of any module that `vit2dpe predict` is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..data.native import NativePreparation
from ..data.prepare import NATIVE, Picture, Prediction, Preparation, pictures, ranked
from ..errors import ConfigError, unknown
from ..modes import evaluating
from ..resolution.sweep import part_size_of
from ..spec import Size
from .features import Features

HALF = (0.5, 0.5, 0.5)


def predict(
    model: nn.Module,
    images: Picture | Sequence[Picture],
    k: int,
    prepare: Preparation | NativePreparation,
    classes: Sequence[str] | None,
    batch_size: int = 64,
    spacing: float | None = None,
) -> Prediction | list[Prediction]:
    """`TimmModel.predict` of any module from images (B, C, H, W) to logits (B, classes); a spacing is given to it."""
    if not getattr(model, "num_classes", 1):
        raise ConfigError(f"this {type(model).__name__} has no classes: it is no classifier")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    several = pictures(images)
    device = next(model.parameters()).device
    found: list[Prediction] = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(several), batch_size):
            made = prepare(several[start : start + batch_size])
            given = made.to(device) if isinstance(made, torch.Tensor) else [one.to(device) for one in made]
            logits = (model(given) if spacing is None else model(given, spacing=spacing)).float()
            found += ranked(logits, classes, k)
    return found if isinstance(images, list | tuple) else found[0]


def preparation_for(
    model: nn.Module, size: Size | None, fit: str | None, max_tokens: int | None, spacing: float | None
) -> Preparation | NativePreparation:
    """What `TimmModel.predict` does to pictures, from its arguments."""
    if fit not in (None, "native"):
        raise unknown("fit", fit, ("native",))
    if fit is None and max_tokens is not None:
        raise ConfigError(f"max_tokens {max_tokens} is of fit='native', images at their own aspect ratio: give both")
    if fit is not None and not (size is None and spacing is None):
        raise ConfigError("fit='native' gives each image a size of its own: leave size and spacing out")
    return preparation_of(model, size) if fit is None else native_preparation(model, max_tokens)


def native_preparation(model: nn.Module, max_tokens: int | None = None) -> NativePreparation:
    """As `preparation_of`, of images that keep their aspect ratio, in at most so many patches; default: the model's.

    Patches beside each other, as of training, also where a model's overlap.

    Raises:
        ConfigError: for a model that takes images of one size at a time; for `max_tokens` of patches that overlap.
    """
    if not isinstance(model, Features):
        raise ConfigError(f"images of different sizes in one batch are for a ViT of ours, got {type(model).__name__}")
    embed = model.patch_embed
    if max_tokens is not None and embed.stride is not None:
        raise ConfigError(
            f"max_tokens {max_tokens} counts patches beside each other, and those of this model overlap (patch_stride "
            f"{embed.stride}): leave it out, and images are as large as those of training"
        )
    mean_std = preparation_of(model)
    p, q = embed.patch_size
    tokens = math.prod(embed.patches(*embed.img_size)) if max_tokens is None else max_tokens
    return NativePreparation((p, q), tokens, mean_std.mean, mean_std.std)


def preparation_of(model: nn.Module, size: Size | None = None) -> Preparation:
    """How images are prepared for a model: by a run's record (`about`), or by timm's (`pretrained_cfg`)."""
    own_size: tuple[int, ...] = part_size_of(model) or model.patch_embed.img_size  # type: ignore[union-attr, assignment]
    if len(own_size) != 2:
        raise ConfigError(f"pictures have two axes, and this model takes {'x'.join(map(str, own_size))}: call it")
    height, width = own_size
    about: Mapping[str, Any] = vars(model).get("about") or {}
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    own, channels = (int(height), int(width)), int(getattr(model, "in_chans", 3))
    if "mean" in about:
        return prepared(about, size or own, own, about["mean"], about["std"])
    mean, std = cfg.get("mean") or HALF[:channels], cfg.get("std") or HALF[:channels]
    return prepared({}, size or own, own, mean, std, float(cfg.get("crop_pct") or 1.0))


def prepared(
    about: Mapping[str, Any],
    size: Size,
    own: Size,
    mean: Sequence[float],
    std: Sequence[float],
    crop: float = 1.0,
    fit: str | None = None,
) -> Preparation:
    """The preparation for a model whose own size is `own`.

    Images are decoded at the larger of the two sizes, as in a sweep over both; those of data that have one size
    (`about["data"]` of a run), at that.
    """
    height, width = (round(max(side) / crop) for side in zip(size, own, strict=True))
    source = NATIVE.get(about.get("data", ""), (height, width))
    return Preparation(size, tuple(mean), tuple(std), fit or about.get("fit", "crop"), crop, source)


def class_names(model: nn.Module) -> Sequence[str] | None:
    """The names of a model's classes by index: a run's, those of a hub folder, or ImageNet's; None without any."""
    about: Mapping[str, Any] = vars(model).get("about") or {}
    if "classes" in about:
        return list(about["classes"])
    if names := hub_names(model):
        return names
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(info.num_classes())]
    return None


def hub_names(model: nn.Module) -> list[str]:
    """The classes that the config.json of a hub folder names; none where it names not every one."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or []
    found = [names[key] for key in sorted(names, key=int)] if isinstance(names, Mapping) else list(names)
    return found if len(found) == getattr(model, "num_classes", None) else []
