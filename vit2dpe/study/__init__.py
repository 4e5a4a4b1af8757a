"""Resolution and length studies, evaluation and probes, and their reports.

Names are imported on first use, so that a command's `--help` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "study": "run",
    "swap": "exchange",
    "evaluate_model": "evaluate",
    "predict_files": "predict",
    "read_predictions": "predict",
    "tune_model": "tuning",
    "Row": "rows",
    "SwapConfig": "..training.swap_settings",
    "read_rows": "rows",
    "StudyConfig": "settings",
    "EvaluateConfig": "settings",
    "PredictConfig": "settings",
    "TuneConfig": "tune_settings",
    "tune": "..resolution.tuning",
    "ProbeConfig": "settings",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    return getattr(importlib.import_module(home if home.startswith(".") else f".{home}", __name__), name)


if TYPE_CHECKING:
    from ..resolution.tuning import tune  # noqa: F401
    from ..training.swap_settings import SwapConfig  # noqa: F401
    from .evaluate import evaluate_model  # noqa: F401
    from .exchange import swap  # noqa: F401
    from .predict import predict_files, read_predictions  # noqa: F401
    from .rows import Row, read_rows  # noqa: F401
    from .run import study  # noqa: F401
    from .settings import EvaluateConfig, PredictConfig, ProbeConfig, StudyConfig  # noqa: F401
    from .tune_settings import TuneConfig  # noqa: F401
    from .tuning import tune_model  # noqa: F401
