"""A study's results as a table: columns, written and read again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = (
    "encoding", "policy", "temperature", "mode", "seed", "train_height", "train_width", "height", "width",
    "top1", "loss", "n", "metric", "value",
)  # fmt: skip


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            {k: v if k in ("encoding", "policy", "temperature", "mode", "metric") else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
