"""One training loop for any task: settings, engine, checkpoints, run folder; and what the commands train with it.

Names are imported on first use, so that a command's `--help` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Task": "task",
    "World": "distributed",
    "fit": "engine",
    "generator": "..seeding",
    "load_run": "checkpoint",
    "load_weights": "initial_weights",
    "save_model": "checkpoint",
    "OptimConfig": "settings",
    "RunConfig": "settings",
    "ModelConfig": "settings",
    "TrainConfig": "settings",
    "PretrainConfig": "pretrain_settings",
    "TextTrainConfig": "text_settings",
    "SampleConfig": "text_settings",
    "train": "objectives.images",
    "pretrain": "objectives.masked_images",
    "train_text": "objectives.text",
    "sample": "sampling",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    value = getattr(importlib.import_module(home if home.startswith(".") else f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if TYPE_CHECKING:
    from ..seeding import generator  # noqa: F401
    from .checkpoint import load_run, save_model  # noqa: F401
    from .distributed import World  # noqa: F401
    from .engine import fit  # noqa: F401
    from .initial_weights import load_weights  # noqa: F401
    from .objectives.images import train  # noqa: F401
    from .objectives.masked_images import pretrain  # noqa: F401
    from .objectives.text import train_text  # noqa: F401
    from .pretrain_settings import PretrainConfig  # noqa: F401
    from .sampling import sample  # noqa: F401
    from .settings import ModelConfig, OptimConfig, RunConfig, TrainConfig  # noqa: F401
    from .task import Task  # noqa: F401
    from .text_settings import SampleConfig, TextTrainConfig  # noqa: F401
