"""One training loop for any task: settings, engine, checkpoints, run folder.

Names are imported on first use, so that a command's `--help` imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Callable[..., Any]:
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
    from .settings import OptimConfig, RunConfig  # noqa: F401
    from .task import Task  # noqa: F401
