"""`vit2dpe bench`: the benchmarks, which live beside the package in a clone of the repository."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError


def load_benchmarks() -> ModuleType:
    """`benchmarks` of the clone that this package lies in.

    Raises:
        ConfigError: where the package is installed without the repository.
    """
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "benchmarks" / "__main__.py").is_file():
        raise ConfigError("vit2dpe bench runs in a clone of the repository, where benchmarks/ lies beside the package")
    if str(clone) not in sys.path:
        sys.path.insert(0, str(clone))
    return importlib.import_module("benchmarks")


def __getattr__(name: str) -> Any:
    if name in ("bench", "BenchConfig"):
        return getattr(load_benchmarks(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
