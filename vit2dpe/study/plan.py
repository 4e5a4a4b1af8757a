"""What the settings of a resolution study mean: read, checked, and as the arguments of its models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.datasets import check_source
from ..encodings import ENCODINGS, parse
from ..errors import ConfigError, unknown
from ..models import Swin, ViT
from ..resolution.policies import POLICIES, TEMPERATURES
from ..resolution.sweep import MODES
from ..spec import parse_size, parse_terms, split_words
from ..training.devices import pick_device, precision
from .settings import StudyConfig, resolve

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"vit": ViT, "swin": Swin}


class Plan(NamedTuple):
    """A study's settings, read and checked."""

    config: StudyConfig
    encodings: list[str]
    train_size: tuple[int, int]
    sizes: list[tuple[int, int]]
    modes: list[str]
    policies: list[str]
    temperatures: list[str]


def check(config: StudyConfig) -> Plan:
    """Everything that can be refused before data are read."""
    if config.data not in ("digits", "folder", "cifar10"):
        raise unknown("data source", config.data, ("digits", "folder", "cifar10"))
    check_source(config.data, unreadable=config.unreadable)
    config = resolve(config)
    if config.arch not in ARCHITECTURES:
        raise unknown("arch", config.arch, ARCHITECTURES)
    if not all(word.isdecimal() and int(word) > 0 for word in split_words(config.stages)):
        raise ConfigError(f"stages are numbers of blocks, such as 2,2, got {config.stages!r}")
    words = list(ENCODINGS) if config.encodings == "all" else split_words(str(config.encodings))
    for word in words:
        parse(word)
    train_size = parse_size(str(config.train_size))
    sizes = [parse_size(size) for size in split_words(str(config.sizes))]
    modes = known("mode", config.modes, MODES)
    temperatures = known("temperature", config.temperatures, ["none", *TEMPERATURES])
    policies = split_words(config.policies)
    for policy in policies:
        parse_terms(policy, "policy", ["all", "default", *POLICIES])
    if config.finetune < 0 or (config.finetune and config.arch != "vit"):
        raise ConfigError(
            f"finetune is a number of epochs, 0 or more, of arch vit; got {config.finetune}, {config.arch}"
        )
    if not words or not sizes or config.seeds < 1 or int(config.epochs or 0) < 1:
        raise ConfigError("a study needs at least one encoding, one size, one seed and one epoch")
    precision(config.precision, pick_device(config.device))
    plan = Plan(config, words, train_size, sizes, modes, policies, temperatures)
    with torch.device("meta"):
        for word in words:
            embed: Any = build(plan, word, channels=3, classes=2).patch_embed
    for size in (train_size, *sizes):
        embed.grid(*size)
    return plan


def build(plan: Plan, word: str, channels: int, classes: int) -> nn.Module:
    return ARCHITECTURES[plan.config.arch](**arguments(plan, word, channels, classes))


def arguments(plan: Plan, word: str, channels: int, classes: int) -> dict[str, Any]:
    config = plan.config
    both = dict(
        position=word,
        img_size=plan.train_size,
        patch_size=config.patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=config.width,
        mlp_ratio=config.mlp_ratio,
        global_pool="avg",
        drop_path_rate=config.drop_path,
    )
    if config.arch == "vit":
        return both | dict(depth=config.depth, num_heads=config.heads, class_token=False)
    depths = [int(blocks) for blocks in split_words(config.stages)]
    heads = [int(config.heads or 1) * 2**i for i in range(len(depths))]
    return both | dict(depths=depths, num_heads=heads, window_size=config.window)


def known(kind: str, text: str, choices: Iterable[str]) -> list[str]:
    """The comma-separated words of `text`, each of them one of the choices."""
    words = split_words(text)
    for word in words:
        if word not in choices:
            raise unknown(kind, word, choices)
    return words
