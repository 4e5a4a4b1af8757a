"""How a checkpoint names its model: a kind, and constructor arguments that JSON can hold."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

from torch import nn

from ..errors import ConfigError, unknown
from .mae import MAE
from .simmim import SimMIM
from .vit import ViT

MODELS = {  # name in a checkpoint -> what is called with its arguments, "module:name" within the package
    "ViT": "models.vit:ViT",
    "Swin": "models.swin.model:Swin",
    "MAE": "models.spec:build_mae",
    "SimMIM": "models.spec:build_simmim",
    "timm": "models.spec:timm_model",
    "TextEncoder": "models.text.heads:TextEncoder",
    "TextDecoder": "models.text.heads:TextDecoder",
    "Seq2Seq": "models.text.seq2seq:Seq2Seq",
}


class ModelSpec(NamedTuple):
    """How to build a model: a name in `MODELS`, and arguments that JSON can hold."""

    kind: str
    arguments: dict[str, Any]

    def build(self) -> nn.Module:
        if self.kind not in MODELS:
            raise unknown("model class", self.kind, MODELS)
        module, _, name = MODELS[self.kind].partition(":")
        make = getattr(importlib.import_module(f"vit2dpe.{module}"), name)
        known = inspect.signature(make).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            for argument in self.arguments:
                if argument not in known:
                    raise unknown(f"option of {self.kind}", argument, known)
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()})


def timm_model(model_name: str, **arguments: Any) -> nn.Module:
    """Any model of timm's registry, ours included."""
    import timm

    if not timm.is_model(model_name):
        raise unknown("model", model_name, timm.list_models())
    try:
        return timm.create_model(model_name, **arguments)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm's {model_name} does not take these arguments {arguments}: {error}") from error


def build_mae(encoder: dict[str, Any], **decoder: Any) -> MAE:
    """What a checkpoint of kind "MAE" says: the encoder's arguments, and the decoder's."""
    return MAE(_encoder(encoder), **decoder)


def build_simmim(encoder: dict[str, Any], mask_unit: int) -> SimMIM:
    """What a checkpoint of kind "SimMIM" says."""
    return SimMIM(_encoder(encoder), mask_unit=mask_unit)


def _encoder(arguments: dict[str, Any]) -> Any:
    """A ViT of these arguments, or a named model of timm's registry."""
    return timm_model(**arguments) if "model_name" in arguments else ViT(**arguments)
