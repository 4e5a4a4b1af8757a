"""One training loop for any task: settings, engine, checkpoints, run folder; and what the commands train with it.

Names are imported on first use: settings are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "OptimConfig": "training.settings",
    "RunConfig": "training.settings",
    "ModelConfig": "training.settings",
    "TrainConfig": "training.settings",
    "PretrainConfig": "training.pretrain_settings",
    "TextTrainConfig": "training.text_settings",
    "SampleConfig": "training.text_settings",
    "Task": "training.task",
    "fit": "training.engine",
    "generator": "seeding",
    "load_run": "training.checkpoint",
    "train": "training.objectives.images",
    "pretrain": "training.objectives.masked_images",
    "train_text": "training.objectives.text",
    "sample": "training.sampling",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vit2dpe.{_HOME[name]}"), name)


if TYPE_CHECKING:
    from ..seeding import generator  # noqa: F401
    from .checkpoint import load_run  # noqa: F401
    from .engine import fit  # noqa: F401
    from .objectives.images import train  # noqa: F401
    from .objectives.masked_images import pretrain  # noqa: F401
    from .objectives.text import train_text  # noqa: F401
    from .pretrain_settings import PretrainConfig  # noqa: F401
    from .sampling import sample  # noqa: F401
    from .settings import ModelConfig, OptimConfig, RunConfig, TrainConfig  # noqa: F401
    from .task import Task  # noqa: F401
    from .text_settings import SampleConfig, TextTrainConfig  # noqa: F401
