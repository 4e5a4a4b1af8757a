"""`vit2dpe predict`: names and probabilities for files and folders of images, or for lines of text."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..data.decode import check_fit
from ..data.folders import files_below, other_files
from ..data.native import NativePreparation
from ..data.prepare import Prediction, Preparation
from ..data.sources import UNREADABLE
from ..data.text import decode_utf8
from ..encodings import named_encodings
from ..errors import ConfigError, DataError, unknown
from ..files import write_atomically
from ..interop.timm.named import is_hub_folder
from ..models.predict import class_names, predict, preparation_for, prepared
from ..models.text.heads import TextEncoder
from ..resolution.apply import set_policy
from ..resolution.sweep import train_size_of
from ..training.checkpoint import load_run, read_meta
from ..training.devices import pick_device
from ..training.run_folder import printable
from .evaluate import check_sizes, load_subject
from .held_out import fit_of_run
from .settings import EvaluateConfig, PredictConfig


class Predicted(NamedTuple):
    """An image by its path, or a text, and what it was taken for."""

    path: str
    prediction: Prediction


Answer = Callable[[list[str]], list[Prediction]]


def predict_files(config: PredictConfig, command: str = "") -> list[Predicted]:
    """Print the likeliest classes of every image or line; write them to `config.out`, if that is given.

    Returns:
        what was printed, in the order of the inputs; files of a folder by their names.

    Raises:
        ConfigError, DataError, CheckpointError: for what cannot work; of inputs that cannot be read, the first one.
    """
    if len(config.inputs) < 2:
        raise ConfigError(
            "predict needs a model and images: vit2dpe predict runs/mine photos/ more.jpg; the model is a run folder, "
            "a hub folder or a timm name"
        )
    if config.unreadable not in UNREADABLE:
        raise unknown("unreadable", config.unreadable, UNREADABLE)
    if config.fit not in (None, "native"):
        check_fit(config.fit)
    name, *places = config.inputs
    if _is_of_text(Path(name)):
        answer, items = _of_text(config, name), _lines(places)
    else:
        items = list_images(places)
        answer = _of_images(config, name)
    found, wrong = _all(items, answer, config)
    if wrong:
        print(f"note: left out because they cannot be read: {len(wrong)} of {len(items)}")
    if not found:
        raise DataError(f"none of {len(items)} could be read; the first one: {next(iter(wrong.values()))}")
    if config.out is not None:
        write_atomically(Path(config.out), to_csv(found).encode("utf-8", "surrogateescape"))
        print(f"\ntable    {printable(config.out)}")
    return found


def list_images(places: Sequence[str]) -> list[str]:
    """Image files, and those of folders at any depth, by their names.

    Raises:
        DataError: for what is not there, and a folder without an image.
    """
    found: list[str] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            inside = files_below(path, "")
            if not inside:
                raise DataError(f"{place} holds no image that Pillow can open{other_files(path)}")
            found += [os.path.join(path, name) for name in inside]
        elif path.is_file():
            found.append(str(path))
        else:
            raise DataError(f"there is no file or folder {place}")
    return found


def to_csv(found: Iterable[Predicted]) -> str:
    """path,class_1,probability_1,class_2,...: a line for each image; `read_predictions` reads it."""
    text, rows = io.StringIO(), list(found)
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, 1 + max((len(row.prediction.classes) for row in rows), default=0))
    writer.writerow(["path", *(name for i in ranks for name in (f"class_{i}", f"probability_{i}"))])
    for path, prediction in rows:
        writer.writerow([path, *(field for pair in zip(*prediction, strict=True) for field in pair)])
    return text.getvalue()


def read_predictions(path: str | Path) -> list[Predicted]:
    """What `vit2dpe predict --out` wrote, with every bit of the probabilities.

    Raises:
        DataError: for a file that is no such table.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            header, *rows = csv.reader(file)
        if header[:3] == ["path", "class_1", "probability_1"]:
            return [Predicted(row[0], Prediction(tuple(row[1::2]), tuple(map(float, row[2::2])))) for row in rows]
    except (OSError, csv.Error, ValueError, IndexError) as error:
        raise DataError(f"{path} cannot be read as predictions: {error}") from None
    raise DataError(f"{path} holds no predictions: its first line is {','.join(header)[:80]!r}")


def _all(items: list[str], answer: Answer, config: PredictConfig) -> tuple[list[Predicted], dict[str, DataError]]:
    """What was answered, printed as it comes, and what could not be read."""
    found: list[Predicted] = []
    wrong: dict[str, DataError] = {}
    for start in range(0, len(items), config.batch_size):
        batch = items[start : start + config.batch_size]
        try:
            answers = answer(batch)
        except DataError:
            if config.unreadable == "error":
                raise
            batch = _readable(batch, answer, wrong)
            answers = answer(batch) if batch else []
        for item, prediction in zip(batch, answers, strict=True):
            pairs = zip(*prediction, strict=True)
            shown = ", ".join(f"{name} {probability:.4f}" for name, probability in pairs)
            print(printable(f"{item}: {shown}"), flush=True)
            found.append(Predicted(item, prediction))
    return found, wrong


def _readable(batch: list[str], answer: Answer, wrong: dict[str, DataError]) -> list[str]:
    """Those of a batch that can be read; the others are named."""
    good = []
    for item in batch:
        try:
            answer([item])
            good.append(item)
        except DataError as error:
            wrong[item] = error
            print(printable(f"note: {error}"))
    return good


def _of_images(config: PredictConfig, name: str) -> Answer:
    subject = load_subject(EvaluateConfig(model=name, checkpoint=config.checkpoint, device=config.device))
    model = subject.model.to(pick_device(config.device)).eval()
    own = train_size_of(model)
    size, about = config.size or own, vars(model).get("about") or {}
    if config.fit == "native" or config.max_tokens is not None:
        native = preparation_for(model, config.size, config.fit, config.max_tokens, config.spacing)
        prepare: Preparation | NativePreparation = replace(native, mean=subject.mean, std=subject.std)
    else:
        fit = config.fit or fit_of_run(name) or "crop"
        prepare = prepared(about, size, own, subject.mean, subject.std, subject.crop, fit)
    _set_policy(model, config.policy)
    check_sizes(model, len(subject.mean), [size], config.spacing)
    classes = subject.classes if subject.strict else class_names(model)
    return lambda files: _list(predict(model, files, config.top, prepare, classes, config.batch_size, config.spacing))


def _set_policy(model: nn.Module, policy: str) -> None:
    if policy == "default":
        return
    if not named_encodings(model):
        raise ConfigError(f"policy {policy!r} needs a model of ours; {type(model).__name__} runs with 'default' only")
    set_policy(model, policy)


def _is_of_text(folder: Path) -> bool:
    if not folder.is_dir() or is_hub_folder(folder):
        return False
    inside = folder / "last" if (folder / "last").is_dir() else folder
    return read_meta(inside).get("task") == "text classification"


def _of_text(config: PredictConfig, name: str) -> Answer:
    for setting in ("size", "fit", "checkpoint", "spacing", "max_tokens"):
        if getattr(config, setting) is not None:
            raise ConfigError(f"{name} is a run of text, which has no use for {setting}: leave it out")
    model = load_run(name, pick_device(config.device))
    if not isinstance(model, TextEncoder):
        raise ConfigError(f"{name} holds a {type(model).__name__}, which is no classifier of text")
    _set_policy(model, config.policy)
    return lambda lines: _list(model.predict(lines, config.top, batch_size=config.batch_size))


def _lines(places: Sequence[str]) -> list[str]:
    """The lines of text files, or of standard input, without empty ones."""
    lines: list[str] = []
    for place in places:
        path = Path(place).expanduser()
        if place != "-" and not path.is_file():
            raise DataError(f"there is no file {place}; a run of text takes files of lines, or - for standard input")
        text = sys.stdin.read() if place == "-" else decode_utf8(path.read_bytes(), path)
        lines += [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{', '.join(places)}: there is no line of text")
    return lines


def _list(found: Prediction | list[Prediction]) -> list[Prediction]:
    return [found] if isinstance(found, Prediction) else found
