"""How a checkpoint names its model: a kind, and constructor arguments that JSON can hold."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, NamedTuple, Union, Unpack, get_args, get_origin, get_type_hints

import timm
from timm.models import get_model_args
from torch import nn

from ..errors import ConfigError, unknown
from .deit import DistilledViT
from .mae import MAE
from .simmim import SimMIM
from .swin.model import Swin
from .text.heads import TextDecoder, TextEncoder
from .text.model import TextModel
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
        if make is not timm_model:
            known = arguments_of(make)
            for argument, value in self.arguments.items():
                if argument not in known:
                    raise unknown(f"option of {self.kind}", argument, known)
                if not _fits(value, known[argument]):
                    wanted = getattr(known[argument], "__name__", None) or str(known[argument])
                    raise ConfigError(f"option {argument} of {self.kind} must be {wanted}, got {value!r}")
        try:
            return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()})
        except (TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, MemoryError) as error:
            raise ConfigError(f"no {self.kind} can be built of {self.arguments}: {error}") from error


def arguments_of(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """Argument -> type of what a model is made with, those that it hands on included."""
    known: dict[str, Any] = {}
    for name, parameter in inspect.signature(make, eval_str=True).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            known[name] = parameter.annotation
        elif get_origin(parameter.annotation) is Unpack:
            known |= get_type_hints(get_args(parameter.annotation)[0])
        else:
            known = arguments_of(HANDED_ON[make]) | known
    return known


def _fits(value: object, hint: Any) -> bool:
    """Whether a value that JSON can hold is of a type; what JSON has no type for fits nothing."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple) and all(any(_fits(item, part) for part in parts) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return hint is Any or type(value) is (origin or hint)


def timm_model(model_name: str, **arguments: Any) -> nn.Module:
    """Any model of timm's registry, ours included."""
    if not timm.is_model(model_name):
        raise unknown("model", model_name, timm.list_models())
    try:
        model: nn.Module = timm.create_model(model_name, **arguments)
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm's {model_name} does not take these arguments {arguments}: {error}") from error
    return model


def takes_size(name: str) -> bool:
    """Whether a model of timm's registry is built for one size of images."""
    if name.startswith("vit2dpe_") or not timm.is_model(name):
        return True
    config = timm.get_pretrained_cfg(name)
    return bool(config is not None and config.fixed_input_size)


def timm_spec(model: nn.Module) -> ModelSpec:
    """How timm builds a model that was made by `timm.create_model` or `from_timm`, at the size it has at present.

    Raises:
        ConfigError: for a model that was made by its class, or with arguments that JSON cannot hold.
    """
    name, arguments = pretrained_cfg_of(model).get("architecture"), get_model_args(model)
    if len(getattr(model, "train_grid", (0, 0))) != 2:
        name = None  # inflated from a model that has one
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
    return ModelSpec("timm" if "model_name" in arguments else "ViT", arguments).build()


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
HANDED_ON: dict[Callable[..., nn.Module], type[nn.Module]] = {  # further arguments go to
    TextEncoder: TextModel,
    TextDecoder: TextModel,
    Seq2Seq: TextModel,
    build_mae: MAE,
    DistilledViT: ViT,
}
