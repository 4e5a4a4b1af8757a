"""The images that `vit2dpe evaluate` measures on, as a model understands them.

Of class folders, a CSV or a dataset those of its test split; of photos that a run was trained on, those it held out. A
model has its channels, mean, deviation and crop, and its numbering of the classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.utils.misc import natural_key
from torch import Tensor, nn

from ..data.datasets import SOURCES, Images, check_source, load_fitted, load_images, normalize
from ..data.folders import Listing
from ..data.image_cache import Reasons, find_unreadable
from ..data.label_files import list_csv
from ..data.layout import list_folders, list_held_out
from ..data.settings import CSV_ENDINGS, DataConfig
from ..data.sources import FILES, readable
from ..data.splits import FileSplit, Split
from ..errors import DataError
from ..spec import Size
from .settings import EvaluateConfig


class Subject(NamedTuple):
    """A model, and how images are prepared for it: normalization, crop, numbering of the classes."""

    model: nn.Module
    label: str  # in the table: the encoding of a run, else the name
    seed: int | None  # of the training, where it is known
    classes: tuple[str, ...] | None  # by index; None where only their number is known
    strict: bool  # whether data of other classes are out of the question
    mean: Sequence[float]
    std: Sequence[float]
    crop: float


@dataclass(frozen=True)
class Batches:
    """(images, labels) as a model takes them, iterated as often as the sweep has rows.

    Args:
        split: images in memory, or files that are decoded anew for every row.
        labels: (N,) in the model's numbering.
        subject: the model, for its mean and deviation.
        size: of a batch.
        digest: of the data, for the record.
        unreadable: files that were left out, with the reason.
    """

    split: Split | FileSplit
    labels: Tensor
    subject: Subject
    size: int
    digest: str
    unreadable: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for index in torch.arange(len(self)).split(self.size):
                if isinstance(self.split, FileSplit):
                    images = torch.cat(list(pool.map(self.split.read, index.tolist())))  # (B, C, H, W)
                else:
                    images = self.split.pixels(index)
                images = images.float() / 255
                if images.shape[1] == 1:
                    images = images.expand(-1, len(self.subject.mean), -1, -1)  # grey is equal red, green and blue
                yield normalize(images, self.subject.mean, self.subject.std), self.labels[index]


def load_test_images(config: EvaluateConfig, subject: Subject, source_size: Size) -> tuple[Batches, int]:
    """The batches, and how many images there were to choose from."""
    own = _data_of_run(config.model)
    fit = config.fit or (own.data.fit if own else "crop")
    kind = config.data.partition(":")[0]
    if kind in SOURCES and kind not in ("folder", "csv"):
        read = DataConfig(name=config.data, root=config.root, fit=fit, unreadable=config.unreadable, cache="memory")
        return _batches(config, subject, load_fitted(read, 0, lambda _: (source_size,))[0])
    check_source("folder", unreadable=config.unreadable, fit=fit)
    where = Path((config.root or "") if kind in ("folder", "csv") else config.data).expanduser()
    root, listing, notes = _list(where)
    if own is not None and own.is_of(where):
        print("note: these are the images that the run was trained on: measured are those that it held out")
        return _batches(config, subject, own.load(source_size, fit, config.unreadable))
    for note in notes:
        print(f"note: {note}")
    names = [name for files in listing.values() for name in files]
    labels = torch.tensor([i for i, files in enumerate(listing.values()) for _ in files])
    limit = len(names) if config.limit is None else config.limit
    index, wrong = _choose(root, names, labels, source_size, limit, config.unreadable == "skip")
    files = np.array([os.fsencode(names[i]) for i in index.tolist()])
    split = FileSplit(root, files, labels[index], source_size, source_size, source_size, fit)
    unreadable = {names[i]: reason for i, reason in sorted(wrong.items())}
    labels = numbering(subject, tuple(listing), folders=True)[split.labels]
    return Batches(split, labels, subject, config.batch_size, f"{len(names)} files", unreadable), len(names)


def _batches(config: EvaluateConfig, subject: Subject, data: Images) -> tuple[Batches, int]:
    """The batches of a dataset's test images, and how many of those there are."""
    split = data.test if config.limit is None else data.test.subsample(config.limit)
    folders = data.name.partition(":")[0] in FILES
    labels = numbering(subject, data.classes, folders=folders)[split.labels]
    for note in data.notes:
        print(f"note: {note}")
    batches = Batches(split, labels, subject, config.batch_size, data.digest, data.unreadable)
    return batches, data.total.get("test", len(data.test))


def _list(where: Path) -> tuple[Path, Listing, list[str]]:
    """The folder that names are relative to, the images of each class to evaluate on, and notes."""
    if where.suffix.lower() not in CSV_ENDINGS:
        return list_held_out(where)
    layout = list_csv(where)
    split = next(split for split in ("test", "val", "train") if split in layout.splits)
    return layout.root, layout.splits[split], layout.notes


class _OfRun(NamedTuple):
    """The data of a run, and the seed of the split that it held out."""

    data: DataConfig
    seed: int

    def is_of(self, where: Path) -> bool:
        """Whether the run was trained on a part of these images that it drew itself."""
        root = Path(self.data.root or "").expanduser()
        if not self.data.root or not where.exists() or root.resolve() != where.resolve():
            return False
        layout = list_csv(where) if where.suffix.lower() in CSV_ENDINGS else list_folders(where)
        return list(layout.splits) == ["train"]

    def load(self, size: Size, fit: str, unreadable: str) -> Images:
        data = self.data
        return load_images(
            data.source,
            data.root,
            source_size=size,
            fit=fit,
            limit_train=data.limit_train if data.val_fraction else None,
            val_fraction=data.val_fraction,
            seed=self.seed,
            cache="auto",
            unreadable=unreadable,
        )


def fit_of_run(model: str) -> str | None:
    """How the images of a run were brought to one size."""
    own = _data_of_run(model)
    return own.data.fit if own else None


def _data_of_run(model: str) -> _OfRun | None:
    """What the config.yaml of a run folder, or of the study that it is a trial of, says about images."""
    import yaml

    folder = Path(model)
    trial = folder.resolve().parent.name == "cells"
    path = folder.resolve().parent.parent / "config.yaml" if trial else folder / "config.yaml"
    if not folder.is_dir() or not path.is_file():
        return None
    before = yaml.safe_load(path.read_text()) or {}
    if not isinstance(before.get("data"), dict):
        return None
    names = ("name", "root", "fit", "limit_train", "val_fraction")
    data = {name: before["data"][name] for name in names if before["data"].get(name) is not None}
    seed = 0 if trial else (before.get("run") or {}).get("seed") or 0
    return _OfRun(DataConfig.of(data), int(seed))


def _choose(root: Path, names: list[str], labels: Tensor, size: Size, limit: int, skip: bool) -> tuple[Tensor, Reasons]:
    """The numbers of `limit` files, balanced over classes, and what is wrong with those left out on the way there.

    To know which can be read they are decoded: those that the limit takes, then one more for each that is left out.
    """
    files = Split(torch.arange(len(names)), labels)  # images are their numbers
    index = files.subsample(limit).images
    tried: list[int] = []
    wrong: Reasons = {}
    while skip and (new := sorted(set(index.tolist()) - set(tried))):
        wrong |= {new[i]: reason for i, reason in find_unreadable(root, [names[i] for i in new], size).items()}
        index = files.subsample(limit, wrong).images
        tried += new
    lost = {place: wrong[number] for place, number in enumerate(tried) if number in wrong}
    readable(lost, [names[i] for i in tried], labels[tried], {names[0].partition("/")[0]: len(tried)})
    return index, wrong


def numbering(subject: Subject, classes: tuple[str, ...], folders: bool) -> Tensor:
    """(C,) the model's index of each class of the data.

    By name where the model's classes have names. Else one to one, but that of `folders` which timm's reader gives them:
    there 2 comes before 10.
    """
    if subject.classes is not None and set(classes) <= set(subject.classes):
        return torch.tensor([subject.classes.index(name) for name in classes])
    count: int = getattr(subject.model, "num_classes", len(classes))
    if subject.strict or count != len(classes):
        strange = [name for name in classes if subject.classes and name not in subject.classes][:3]
        raise DataError(
            f"the model has {count} classes, the data have {len(classes)}"
            + (f", among them {', '.join(strange)}, which are not among the model's" if strange else "")
            + '; give a model of these classes: --model "name(num_classes=...)" --checkpoint weights.safetensors'
        )
    theirs = sorted(classes, key=natural_key) if folders else list(classes)
    return torch.tensor([theirs.index(name) for name in classes])
