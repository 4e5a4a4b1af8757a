"""Settings of a study, parsed and checked: which models it trains, and what it measures them at."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..data.datasets import check_source
from ..encodings import ENCODINGS, parse
from ..errors import ConfigError, unknown
from ..models import Swin, ViT
from ..models.spec import ModelSpec
from ..resolution.policies import POLICIES, TEMPERATURES
from ..resolution.sweep import MODES
from ..spec import Size, parse_size, parse_terms, split_words
from ..training.devices import pick_device, precision
from ..training.tasks.sequences import SEQUENCES
from .settings import StudyConfig, resolve

TASKS = ("images", "text", *SEQUENCES)
SOURCES = ("digits", "folder", "cifar10")
ARCHITECTURES = {"vit": "ViT", "swin": "Swin"}


class Trial(NamedTuple):
    """One training of a study."""

    encoding: str
    depth: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """Settings of a study, parsed and checked.

    Args:
        config: with the presets of its data filled in.
        encodings, depths: each encoding is trained at each depth (images: at one).
        train_size, sizes: (height, width) in pixels; of text and sequences (1, tokens).
        modes: of images, as in `sweep`.
        policies: specs, or "all", or "default".
        temperatures: names, or "none".
        stages: blocks of each stage of a Swin.
    """

    config: StudyConfig
    encodings: tuple[str, ...]
    depths: tuple[int, ...]
    train_size: Size
    sizes: tuple[Size, ...]
    modes: tuple[str, ...]
    policies: tuple[str, ...]
    temperatures: tuple[str, ...]
    stages: tuple[int, ...]

    @property
    def trials(self) -> list[Trial]:
        seeds = range(self.config.seeds)
        return [Trial(encoding, depth, seed) for seed in seeds for depth in self.depths for encoding in self.encodings]

    def model_name(self, trial: Trial) -> str:
        """The encoding, and the depth where there are several."""
        return f"{trial.encoding}, depth {trial.depth}" if len(self.depths) > 1 else trial.encoding

    def model_spec(self, trial: Trial, classes: int, channels: int = 3) -> ModelSpec:
        """How to build the model of a trial.

        Args:
            classes: of images, or the size of the vocabulary.
            channels: of images.
        """
        config = self.config
        arguments: dict[str, Any] = dict(
            position=trial.encoding,
            embed_dim=config.width,
            depth=trial.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
        )
        if config.task != "images":
            arguments |= dict(vocab_size=classes, context=self.train_size[1], embed_scale=config.embed_scale)
            if config.task == "text":
                return ModelSpec("TextDecoder", arguments)
            return ModelSpec("TextEncoder", arguments | dict(pool="", num_classes=classes))
        arguments |= dict(img_size=self.train_size, patch_size=config.patch, in_chans=channels, num_classes=classes)
        arguments |= dict(global_pool="avg")
        if config.arch == "vit":
            return ModelSpec("ViT", arguments | dict(class_token=False))
        del arguments["depth"]
        heads = [int(config.heads or 1) * 2**i for i in range(len(self.stages))]
        arguments |= dict(depths=list(self.stages), num_heads=heads, window_size=config.window)
        return ModelSpec("Swin", arguments)


def check(config: StudyConfig) -> Plan:
    """The plan of a study; refuses whatever can be refused before data are read.

    Raises:
        ConfigError: for settings that cannot work.
    """
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    images = config.task == "images"
    if images:
        if config.data not in SOURCES:
            raise unknown("data source", config.data, SOURCES)
        check_source(config.data, unreadable=config.unreadable)
    config = resolve(config)
    if config.arch not in ARCHITECTURES:
        raise unknown("arch", config.arch, ARCHITECTURES)
    encodings = tuple(ENCODINGS) if config.encodings == "all" else tuple(split_words(str(config.encodings)))
    for encoding in encodings:
        parse(encoding)
    policies = tuple(split_words(config.policies))
    for policy in policies:
        parse_terms(policy, "policy", ["all", "default", *POLICIES])
    depths: tuple[int, ...] = (int(config.depth or 0),)
    if images:
        train_size = parse_size(str(config.train_size))
        sizes = tuple(parse_size(size) for size in split_words(str(config.sizes)))
    else:
        train_size = (1, int(config.train_length or 0))
        sizes = tuple((1, length) for length in _numbers("lengths", config.lengths or str(config.train_length)))
        depths = _numbers("depths", config.depths or str(config.depth))
    plan = Plan(
        config,
        encodings,
        depths,
        train_size,
        sizes,
        modes=known("mode", config.modes, MODES) if images else (),
        policies=policies,
        temperatures=known("temperature", config.temperatures, ["none", *TEMPERATURES]),
        stages=_stages(config.stages) if images else (),
    )
    if config.finetune < 0 or (config.finetune and config.arch != "vit"):
        raise ConfigError(
            f"finetune is a number of epochs, 0 or more, of arch vit; got {config.finetune}, {config.arch}"
        )
    if not encodings or not sizes or config.seeds < 1 or int(config.epochs or 0) < 1 or train_size[1] < 1:
        raise ConfigError("a study needs at least one encoding, one size, one seed and one epoch")
    precision(config.precision, pick_device(config.device))
    _build(plan)
    return plan


def _build(plan: Plan) -> None:
    """Every encoding's model, without memory for its weights; its patches have to fit every size."""
    with torch.device("meta"):
        for encoding in plan.encodings:
            model = plan.model_spec(Trial(encoding, plan.depths[0], seed=0), classes=2).build()
            if isinstance(model, ViT | Swin):
                for size in (plan.train_size, *plan.sizes):
                    model.patch_embed.grid(*size)


def known(kind: str, text: str, choices: Collection[str]) -> tuple[str, ...]:
    """The comma-separated words of `text`, each of them one of the choices."""
    words = split_words(text)
    for word in words:
        if word not in choices:
            raise unknown(kind, word, choices)
    return tuple(words)


def _stages(text: str) -> tuple[int, ...]:
    words = split_words(text)
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"stages are numbers of blocks, such as 2,2, got {text!r}")
    return tuple(int(word) for word in words)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    words = split_words(text)
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"--{name} are whole numbers above 0, separated by commas, got {text!r}")
    return tuple(int(word) for word in words)
