"""`vit2dpe bench`: the benchmarks, which live beside the package in a clone of the repository."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

from ..errors import ConfigError
from .options import settings


def bench(args: list[str]) -> int:
    """Run `benchmarks` of the clone that this package lies in.

    Raises:
        ConfigError: where the package is installed without the repository.
    """
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "benchmarks" / "__main__.py").is_file():
        raise ConfigError("vit2dpe bench runs in a clone of the repository, where benchmarks/ lies beside the package")
    if str(clone) not in sys.path:
        sys.path.insert(0, str(clone))
    benchmarks = importlib.import_module("benchmarks")
    benchmarks.bench(settings("bench", benchmarks.BenchConfig, args), command=shlex.join(["vit2dpe", "bench", *args]))
    return 0
