"""Names of timm's models as users write them, with arguments, and the model of a name, as one of ours where it can be.

vit_tiny_patch16_224.augreg_in21k_ft_in1k     a name with a tag
vit_tiny_patch16_224(img_size=64)             with arguments of timm.create_model
hf-hub:<user>/<name>, local-dir:<folder>      timm's other places
"""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from ...errors import ConfigError
from ...models.spec import Arguments
from ...models.timm_api import TimmModel
from ...spec import parse_terms
from .convert import from_timm
from .names import create

OVERLAYS = ("pretrained_cfg", "pretrained_cfg_overlay")  # arguments that name weights
REFUSALS = (RuntimeError, OSError, TypeError, AssertionError)  # timm's ways to refuse; no network


def split_name(text: str) -> tuple[str, Arguments]:
    """A name, and the arguments behind it in parentheses.

    Raises:
        ConfigError: if it cannot be read.
    """
    name, bracket, rest = text.partition("(")
    if bracket and not rest.endswith(")"):
        raise ConfigError(f"a name with arguments is written 'name(num_classes=10)', got {text!r}")
    return name.strip(), dict(parse_terms(f"model({rest}", "model", ["model"])[0][1]) if bracket else {}


def is_hub_folder(folder: Path) -> bool:
    """Whether it is a folder of the Hugging Face hub rather than one of a run."""
    run = any((folder / place / "model.json").is_file() for place in (".", "last"))
    return (folder / "config.json").is_file() and not run


def has_weights(name: str, arguments: Arguments) -> bool:
    """Whether timm has weights for a name, or was told of some; of hubs and folders this is found out by loading."""
    if ":" in name or any(arguments.get(given) for given in ("checkpoint_path", *OVERLAYS)):
        return True
    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and config.has_weights)


def named_model(name: str, arguments: Arguments, *, pretrained: bool) -> tuple[nn.Module, ConfigError | None]:
    """The model of a name: ours, theirs as one of ours with its own encoding, or, with the reason, theirs as it is.

    Args:
        pretrained: load its weights, by timm's loader; else it lies on the meta device, without data.

    Raises:
        ConfigError: for an unknown name, and for what timm refuses.
    """
    try:
        if pretrained:
            model = create(name, pretrained="checkpoint_path" not in arguments, **arguments)
        else:
            built = {argument: value for argument, value in arguments.items() if argument != "checkpoint_path"}
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # timm draws parameters that have no data
                model = create(name, **built)
    except REFUSALS as error:
        what = "load the weights of" if pretrained else "make"
        raise ConfigError(f"timm could not {what} {name}: {' '.join(str(error).split())}") from error
    if isinstance(model, TimmModel):
        return model, None
    try:
        return from_timm(model), None
    except ConfigError as error:
        return model, error
