"""One measurement of one model, `Row`, and the table of them, `results.csv`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import DataError

PLAIN = "plain"  # Row.training
REQUIRED = ("encoding", "policy", "mode", "height", "width", "top1")  # of a table of any version


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of `results.csv`: one metric of a model under a policy at a size, over `n` samples.

    A new column is one more field at the end, with a default: files that lack it are read with that default.

    Args:
        encoding: spec of the positional encoding, or the name of a model that is not ours.
        policy, temperature: resolution policy and length temperature (`vit2dpe.use_policy`).
        mode: images: scale or canvas; text: the part of a window that is scored; sequences: the depth.
        seed: of the training; None where it is unknown.
        train_height, train_width, height, width: pixels; text: height 1, width the length in tokens.
        top1: accuracy in percent.
        loss: cross-entropy in nats.
        metric, value: a name in `tables.METRICS` and its number. Further metrics of a model are rows of their own.
        depth: number of blocks, where a study has several.
        start: of a study from weights: "weights" of what was trained on from them, "scratch" of the control.
        training: what varied in training, a word of `training.varied.TRAININGS`.
        spacing: the size of a pixel in the world over that of training, where it was given.
    """

    encoding: str
    policy: str
    temperature: str = "none"
    mode: str
    seed: float | None = None
    train_height: float
    train_width: float
    height: float
    width: float
    top1: float | None = None
    loss: float | None = None
    n: float | None = None
    metric: str = "top1"
    value: float
    depth: float | None = None
    start: str = ""
    training: str = PLAIN
    spacing: float | None = None

    @property
    def subject(self) -> str:
        """What is compared: the encoding, and what varied in its training."""
        return self.encoding if self.training == PLAIN else f"{self.encoding}, {self.training}"

    @property
    def label(self) -> str:
        """The line of a table or a picture: the subject, of the control with how it began."""
        return f"{self.subject}, from scratch" if self.start == SCRATCH else self.subject

    @property
    def size(self) -> tuple[float, float]:
        return self.height, self.width

    @property
    def train_size(self) -> tuple[float, float]:
        return self.train_height, self.train_width

    @property
    def blocks(self) -> int | None:
        """The depth; older tables of sequences and of text have it in their mode alone."""
        found = _DEPTH.search(self.mode)
        return int(self.depth) if self.depth is not None else int(found[1]) if found else None

    @property
    def part(self) -> str:
        """The mode without a depth; of sequences nothing is left."""
        return _DEPTH.sub("", self.mode)

    @property
    def panel(self) -> str:
        """Mode and depth, where there are several: the line of a table, the panel of a picture."""
        return self.mode if self.depth is None or _DEPTH.search(self.mode) else f"{self.mode}, depth {self.blocks}"


SCRATCH, WEIGHTS = "scratch", "weights"  # Row.start
_DEPTH = re.compile(r"(?:, |^)depth (\d+)$")
COLUMNS = tuple(field.name for field in fields(Row))
# Columns that stand in a table where one of its rows has another value.
_WHERE_USED = {"depth": None, "start": "", "training": PLAIN, "spacing": None}
_TEXT = tuple(field.name for field in fields(Row) if field.type == "str")


def to_csv(rows: Iterable[Row]) -> str:
    """The table with its header; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = list(rows)
    columns = [
        c for c in COLUMNS if c not in _WHERE_USED or any(getattr(row, c) not in (None, _WHERE_USED[c]) for row in rows)
    ]
    writer.writerow(columns)
    writer.writerows([getattr(row, column) for column in columns] for row in rows)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """The rows of a table of any version; numbers are floats, columns that `Row` does not have are passed over.

    Raises:
        DataError: for a file that is no such table.
    """
    try:
        with path.open(newline="") as file:
            records = list(csv.DictReader(file))
        missing = [column for column in REQUIRED if records and column not in records[0]]
        if not missing:
            return [_read_row(record) for record in records]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a study's results: {error}") from None
    raise DataError(f"{path} is no study's results: it has no {', '.join(missing)}")


def _read_row(record: Mapping[str, str | None]) -> Row:
    values: dict[str, Any] = {}
    for column in COLUMNS:
        if text := record.get(column):
            values[column] = text if column in _TEXT else float(text)
    values.setdefault("train_height", values["height"])  # columns that the first tables did not have
    values.setdefault("train_width", values["width"])
    if "value" not in values:
        values["value"] = values["top1"]
    return Row(**values)
