"""timm's names: a model by its name, and the covered name that is nearest to a refused one."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from typing import Any

import timm
import torch
from torch import nn

from ...errors import ConfigError, unknown

# Of timm's modules those with the covered families.
MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_relpos",
    "naflexvit",
    "swin_transformer",
    "swin_transformer_v2",
)


def create(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with an error of ours for a name that timm has not.

    Raises:
        ConfigError: for an unknown name or tag, with the nearest one.
    """
    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown timm model {architecture!r}; {hint}timm.list_models() has all of them")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise unknown(f"pretrained tag of {architecture}", name.partition(".")[2], tags) from None
    model: nn.Module = timm.create_model(name, **kwargs)
    return model


def nearest(name: str, reads: Callable[[nn.Module], bool]) -> str | None:
    """The covered name that is spelled most like `name`; None where there is none like it.

    Args:
        reads: whether a model of one of `MODULES` is covered.
    """
    candidates = [known for module in MODULES for known in timm.list_models(module=module) if known != name]
    close = difflib.get_close_matches(name, candidates, n=20, cutoff=0.6)
    close.sort(key=lambda known: -_shared(known, name))  # a family's name stands in front
    return next((known for known in close if _covered(known, reads)), None)


def _shared(one: str, other: str) -> int:
    """How many letters they begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@cache
def _covered(name: str, reads: Callable[[nn.Module], bool]) -> bool:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # timm draws parameters that have no data
        return reads(timm.create_model(name))
