"""Accuracy and precision of each class, from counts that are added up over batches and processes.

Counts are int64 (3, C): how many images each class has, how many of those are right, how many images were named so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.datasets import Images
from ..files import write_atomically
from ..resolution.sweep import evaluate
from ..spec import Size
from .checkpoint import load_run
from .devices import evaluation_precision
from .distributed import ALONE, sum_over_ranks
from .session import TrainSession
from .tasks.classification import evaluation_batches

CLASSES = "classes.csv"
FEW = 20  # classes that are shown in a table for readers
_NUMBERS = ("n", "accuracy", "precision")


@dataclass(frozen=True)
class ClassRow:
    """A line of `classes.csv`.

    Args:
        name: of the class; empty: the mean over all classes that have images, whose accuracy is the balanced one.
        n: images of the class; of all.
        accuracy: recall, the share of these images that is right, in percent; None without images.
        precision: the share of right ones among the images that were named so, in percent; None where none was.
    """

    name: str
    n: int
    accuracy: float | None
    precision: float | None

    @property
    def cells(self) -> list[str]:
        """Numbers for readers."""
        return [str(self.n), *("" if one is None else f"{one:.1f}" for one in (self.accuracy, self.precision))]


def rows_of(counts: Tensor, classes: Sequence[str], *, seen: bool = False) -> list[ClassRow]:
    """A row for each class, and the mean over the classes that have images.

    Args:
        counts: (3, C); (2, C) where what images were named was not kept: then there is no precision.
        classes: their names; by its number a class without one.
        seen: leave out classes that have no image and were named for none.
    """
    of, right, *more = counts.tolist()
    names, named = [*classes, *map(str, range(len(classes), len(of)))], more[0] if more else [0] * len(of)
    rows = [
        ClassRow(name, n, 100 * hits / n if n else None, 100 * hits / named_so if named_so else None)
        for name, n, hits, named_so in zip(names, of, right, named, strict=True)
        if n or named_so or not seen
    ]
    there = [row for row in rows if row.accuracy is not None]
    accuracy = sum(row.accuracy or 0 for row in there) / max(1, len(there))
    precision = sum(row.precision or 0 for row in there) / max(1, len(there))  # of a class never named 0, as sklearn's
    return [*rows, ClassRow("", sum(of), accuracy, precision if more else None)]


def balanced_accuracy(rows: Sequence[ClassRow]) -> str:
    """In a sentence."""
    there = sum(row.n > 0 for row in rows[:-1])
    return f"balanced accuracy {rows[-1].accuracy:.2f}% (mean of {there} classes, {rows[-1].n} images)"


def write_classes(path: Path, found: Sequence[tuple[Mapping[str, str | float], Sequence[ClassRow]]]) -> None:
    """Write rows of several measurements; each with what was measured, as columns before the class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(found[0][0] if found else ()), "class", *_NUMBERS])
    for what, rows in found:
        writer.writerows([*what.values(), row.name, row.n, row.accuracy, row.precision] for row in rows)
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_classes(path: Path) -> list[tuple[dict[str, str], ClassRow]]:
    """What `write_classes` wrote: each row with what was measured."""
    found = []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for record in csv.DictReader(file):
            n, *shares = (record.pop(name) for name in _NUMBERS)
            accuracy, precision = (float(share) if share else None for share in shares)
            found.append((record, ClassRow(record.pop("class"), int(n), accuracy, precision)))
    return found


def markdown(caption: str, rows: Sequence[ClassRow]) -> list[str]:
    """A table for readers, of few classes; of many the least accurate ones."""
    shown = list(rows[:-1])
    if len(shown) > FEW:
        shown = sorted((row for row in shown if row.accuracy is not None), key=lambda row: row.accuracy or 0)[:FEW]
        caption = f"{caption}: the {FEW} least accurate classes of {len(rows) - 1}"
    named = [(row.name.replace("|", "\\|"), row) for row in shown]
    lines = ["| " + " | ".join([name, *row.cells]) + " |" for name, row in [*named, ("mean of classes", rows[-1])]]
    return [caption, "", "| class | n | accuracy [%] | precision [%] |", "|---|---:|---:|---:|", *lines, ""]


def measure_classes(session: TrainSession, data: Images, size: Size, workers: int | None) -> list[str]:
    """Measure the best weights by class, each process its part of every held-out split; write `classes.csv`.

    Where not all processes see the run folder, the first measures alone.

    Returns:
        a line for each split, of the first process.
    """
    folder, device, world = session.folder, session.device, session.world
    if not all(world.gather(["seen" if (folder / "best" / "model.json").is_file() else ""])):
        if not world.first:
            return []
        world = ALONE
    model, found = load_run(folder, device, which="best"), []
    for split in data.held_out:
        batches = evaluation_batches(data, size, world=world, split=split, workers=workers, device=device)
        counts: list[Tensor] = []
        with evaluation_precision(session.config.run.precision, device):
            evaluate(model, batches, least=0, by_class=counts)
        total = sum_over_ranks(counts[0].flatten().tolist(), world)
        whole = torch.tensor(total).long().view_as(counts[0])
        found.append(({"split": split}, rows_of(whole, data.classes)))
    if not world.first:
        return []
    write_classes(folder / CLASSES, found)
    return [f"{what['split']} {balanced_accuracy(rows)}" for what, rows in found]


def classes_section(folder: Path) -> list[str]:
    """The classes of the test images, for summary.md."""
    rows = [row for what, row in read_classes(folder / CLASSES) if what["split"] == "test"]
    return markdown("Test images by class, of best/", rows)
