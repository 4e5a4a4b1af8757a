"""Logs of a training: `metrics.csv`, a progress bar or lines on the terminal, TensorBoard and W&B on request."""

from __future__ import annotations

import csv
import io
import math
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from ..errors import ConfigError, install
from ..files import write_atomically
from ..spec import Plain

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

Row = dict[str, float]  # numbers by their column


class Table:
    """`metrics.csv`, a row an epoch; a resumed run keeps the rows up to its checkpoint.

    Args:
        path: the file.
        keep: how many of the rows in it are kept.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self.rows: list[Row] = read_table(path)[:keep] if keep else []
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        # Rewritten each time: a table is small, and readers never get half a line.
        text = io.StringIO()
        if self.rows:
            columns = max((list(row) for row in reversed(self.rows)), key=len)  # without an evaluation some lack
            writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue().encode())


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file, numbers as int or float, other values as str; [] if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(TypeError, ValueError):
            return kind(text)
    return text


class Bar:
    """A tqdm bar on a terminal; a line every ten seconds where output goes to a file."""

    def __init__(self, total: int, name: str, start: int = 0, show: bool = True) -> None:
        self.total, self.name, self.last_line = total, name, time.monotonic()
        self.bar: tqdm[Never] | None = None
        self.show = show
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=name, leave=False, unit="step")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, row: Row) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(1)
            if math.isfinite(row["train_loss"]):  # it is not there yet after the first step on a GPU
                self.bar.set_postfix(loss=f"{row['train_loss']:.3f}")
        elif self.show and now - self.last_line > 10:
            self.last_line = now
            line = f"{self.name}: epoch {row['epoch']}/{row['epochs']}, step {row['step']}/{self.total}"
            print(f"{line}, loss {row['train_loss']:.3f}", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        elif self.show:
            print(text, file=sys.stderr, flush=True)


class Trackers:
    """TensorBoard and Weights & Biases, imported on request. The x-axis of both is the update.

    Args:
        folder: of the run; events go to `folder/tensorboard`, W&B's files to `folder/wandb`.
        tensorboard: whether TensorBoard's events are written.
        wandb: the name of a W&B project. WANDB_MODE=offline needs no account.
        about: settings that W&B shows beside the curves.
        resume: go on with W&B's run of this folder, by the id in `folder/wandb_id`; else it is a new one.
    """

    def __init__(
        self, folder: Path, tensorboard: bool, wandb: str | None, about: Mapping[str, Plain], resume: bool = False
    ) -> None:
        self.writer: SummaryWriter | None = None
        self.run: Any = None  # wandb has no types where it is not installed
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(f"run.tensorboard needs it installed ({error}): {install('tracking')}") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"))
        if wandb:
            try:
                import wandb as service
            except ImportError as error:
                raise ConfigError(f"run.wandb needs it installed ({error}): {install('tracking')}") from None
            self.run = service.init(
                project=wandb,
                name=folder.name,
                dir=str(folder),
                id=_wandb_id(folder, resume),
                resume="allow",
                config=dict(about),
            )

    def add(self, row: Row) -> None:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        if self.writer is not None:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, row["step"])
            self.writer.flush()
        if self.run is not None:
            self.run.log(numbers, step=row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish()


def _wandb_id(folder: Path, resume: bool) -> str:
    """The id of this folder's run: unlike that of any other folder of its name, and kept in `folder/wandb_id`."""
    path, name = folder / "wandb_id", re.sub(r"[^\w.-]+", "_", folder.name)
    if resume and path.is_file() and (kept := path.read_text().strip()):
        return kept
    # Versions that kept no id took the name alone.
    new = name[:64] if resume and (folder / "wandb").is_dir() else f"{name[:55]}-{secrets.token_hex(4)}"
    write_atomically(path, new.encode())
    return new
