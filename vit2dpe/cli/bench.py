"""`vit2dpe bench`: the benchmarks, which live beside the package in a clone of the repository."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import ConfigError, clone
from ..spec import Settings


@dataclass(frozen=True)
class NoBench(Settings):
    """Not here: the benchmarks lie beside the package in a clone of the repository, this one is installed alone."""


def load_benchmarks() -> ModuleType:
    """`benchmarks` of the clone that this package lies in.

    Raises:
        ConfigError: where the package is installed without the repository.
    """
    root = clone()
    if root is None:
        raise ConfigError("vit2dpe bench runs in a clone of the repository, where benchmarks/ lies beside the package")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks")


def __getattr__(name: str) -> Any:
    if name == "BenchConfig" and clone() is None:
        return NoBench  # for --help
    if name in ("bench", "BenchConfig"):
        return getattr(load_benchmarks(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
