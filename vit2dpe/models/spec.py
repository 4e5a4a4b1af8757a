"""How a checkpoint names its model: a kind, and constructor arguments that JSON can hold."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from timm.models import get_model_args
from torch import nn

from ..errors import ConfigError, unknown
from .deit import DistilledViT
from .mae import MAE
from .simmim import SimMIM
from .swin.model import Swin
from .text.heads import TextDecoder, TextEncoder
from .text.seq2seq import Seq2Seq
from .timm_api import pretrained_cfg_of
from .vit import ViT

Arguments = dict[str, Any]  # of a constructor, by name, as JSON holds them


class ModelSpec(NamedTuple):
    """How to build a model: a name in `MODELS`, and arguments that JSON can hold."""

    kind: str
    arguments: Arguments

    def build(self) -> nn.Module:
        if self.kind not in MODELS:
            raise unknown("model class", self.kind, MODELS)
        make = MODELS[self.kind]
        known = inspect.signature(make).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            for argument in self.arguments:
                if argument not in known:
                    raise unknown(f"option of {self.kind}", argument, known)
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()})


def timm_model(model_name: str, **arguments: Any) -> nn.Module:
    """Any model of timm's registry, ours included."""
    if not timm.is_model(model_name):
        raise unknown("model", model_name, timm.list_models())
    try:
        model: nn.Module = timm.create_model(model_name, **arguments)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm's {model_name} does not take these arguments {arguments}: {error}") from error
    return model


def timm_spec(model: nn.Module) -> ModelSpec:
    """How timm builds a model that was made by `timm.create_model` or `from_timm`, at the size it has at present.

    Raises:
        ConfigError: for a model that was made by its class, or with arguments that JSON cannot hold.
    """
    name, arguments = pretrained_cfg_of(model).get("architecture"), get_model_args(model)
    if name is None:
        raise ConfigError(
            f"timm has no name for this {type(model).__name__}, which was made by its class: give its arguments"
        )
    for argument, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{argument} is a {type(value).__name__}, which JSON cannot hold: give arguments with a word instead"
            ) from None
    return ModelSpec("timm", dict(model_name=name) | arguments)


def build_mae(encoder: Arguments, **decoder: Any) -> MAE:
    """A masked autoencoder of the encoder's arguments and the decoder's."""
    return MAE(_encoder(encoder), **decoder)


def build_simmim(encoder: Arguments, mask_unit: int) -> SimMIM:
    """A SimMIM around an encoder of these arguments."""
    return SimMIM(_encoder(encoder), mask_unit=mask_unit)


def _encoder(arguments: Arguments) -> Any:
    """A ViT of these arguments, or a named model of timm's registry; MAE and SimMIM refuse others than ours."""
    return timm_model(**arguments) if "model_name" in arguments else ViT(**arguments)


MODELS: dict[str, Callable[..., nn.Module]] = {  # name in a checkpoint -> factory
    "ViT": ViT,
    "DistilledViT": DistilledViT,
    "Swin": Swin,
    "MAE": build_mae,
    "SimMIM": build_simmim,
    "timm": timm_model,
    "TextEncoder": TextEncoder,
    "TextDecoder": TextDecoder,
    "Seq2Seq": Seq2Seq,
}
