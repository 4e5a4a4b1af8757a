"""Image datasets: loading with subsets, validation split and statistics; normalisation. `sources` reads the files.

Legend: N images, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, unknown
from ..files import write_atomically
from ..spec import Size
from .settings import DataConfig
from .sources import CACHES, FOLDERS, SOURCES, UNREADABLE
from .splits import FileSplit, Split, digest_of, resize


@dataclass(frozen=True)
class Images:
    """An image dataset, in memory or on disk.

    Args:
        name: its source.
        classes: class names; a label is an index into them.
        train, test: the two splits, of one image size.
        mean, std: of every channel over the pixels of `train`, for images in [0, 1].
        digest: sha256 of all splits: equal digests, equal data.
        notes: remarks on the data for the user, a line each.
        val: the part of training that `val_fraction` held out; if there is one, it decides early stopping and `best/`.
        total: how many images the source has in `train`, and in `test`, used or not.
        unreadable: the files that were left out because they cannot be read, with the reason.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | FileSplit
    test: Split | FileSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    notes: tuple[str, ...]
    val: Split | FileSplit | None = None
    total: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def native(self) -> Size:
        """(H, W) of the stored images."""
        return self.train.size

    @property
    def held_out(self) -> dict[str, Split | FileSplit]:
        """The splits that are evaluated, by name; the first decides which weights are best."""
        return ({} if self.val is None else {"val": self.val}) | {"test": self.test}

    @property
    def used(self) -> str:
        """How many images are used, of how many: `train 4990 of 5000, test 500 of 500`."""
        train = f"train {len(self.train)}" + ("" if self.val is None else f" and val {len(self.val)}")
        held_out = f"test {len(self.test)}" + (f" of {self.total['test']}" if "test" in self.total else "")
        return f"{train} of {self.total['train']}, {held_out}" if self.total else f"{train}, {held_out}"


def load_images(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    source_size: Size | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    cache: str = "memory",
    unreadable: str = "error",
) -> Images:
    """Load an image dataset.

    Args:
        name: a key of `SOURCES`.
        root: where it lies; see the source.
        source_size: (H, W) that the images of a `folder` are brought to in decoding.
        limit_train, limit_test: keep a balanced part of this many images (`LabelledDataset.subsample`).
        val_fraction: hold out this part of every class of the training images, drawn by `seed`, as `Images.val`;
            where a `folder` has no held-out split, as `Images.test`.
        cache: memory: decoded once and kept; none: decoded from files each time, by worker processes (`loader`);
            auto: memory where it is large enough.
        unreadable: error: a file that cannot be read stops the load; skip: it is left out of its split, counted and
            listed with the reason (`Images.unreadable`). More than ten of a split that are more than 1% of it, and a
            class that is left without an image, stop the load all the same.

    Raises:
        ConfigError: for an unknown name, or a setting that the source does not take.
        DataError: for data that are missing, unreadable, not laid out as required, or without labels.
    """
    check_source(name, cache=cache, unreadable=unreadable)
    kind, _, what = name.partition(":")
    where, source = what or root, SOURCES[kind]
    if kind in FOLDERS:
        source = partial(source, cache=cache, alone=val_fraction > 0, unreadable=unreadable)
    classes, train, test, notes, lost = source(Path(where).expanduser() if where else None, source_size)
    for split, part in (("train", train), ("test", test)):
        _check_labels(name, split, part, len(classes))
    total = dict(train=len(train) + len(lost[0])) | ({} if test is None else dict(test=len(test) + len(lost[1])))
    for split, reasons in zip(total, lost, strict=False):
        if reasons:
            notes.append(f"images of {split} that cannot be read, left out: {len(reasons)} of {total[split]}")
    train = train if limit_train is None else train.subsample(limit_train)
    val: Split | FileSplit | None = None
    if val_fraction:
        train, val = train.hold_out(val_fraction, seed)
        note = f"validation: {len(val)} images, {val_fraction:g} of every class of train, by seed {seed}"
        notes.append(f"{note}; there is no other held-out split" if test is None else note)
    if test is None:
        if val is None:
            raise DataError(f"{name} has no held-out split: data.val_fraction makes one of the training images")
        test, val = val, None
    test = test if limit_test is None else test.subsample(limit_test)
    with ThreadPoolExecutor(1) as thread:  # hashing releases the interpreter's lock
        digest = thread.submit(digest_of, *(split for split in (train, test, val) if split is not None))
        mean, std = _statistics(train.sample())
        if isinstance(train, Split) and isinstance(test, Split) and (leaked := _shared(train, test)):
            notes.append(f"same image in train and test: {leaked}")
    return Images(name, classes, train, test, mean, std, digest.result(), tuple(notes), val, total, lost[0] | lost[1])


def _check_labels(name: str, split: str, part: Split | FileSplit | None, classes: int) -> None:
    """Refuse labels that are no index of a class: public test sets have -1 where the label is kept secret."""
    if part is None or not bool((wrong := (part.labels < 0) | (part.labels >= classes)).any()):
        return
    first, images = int(wrong.nonzero()[0]), "training" if split == "train" else "held-out"
    raise DataError(
        f"{int(wrong.sum())} of the {len(part)} labels of {name}'s {images} images are none of its {classes} classes, "
        f"0 to {classes - 1}: the first is {int(part.labels[first])}, of image {first}; a split whose labels are kept "
        "secret (-1) cannot be measured on: give data whose held-out split has them"
    )


def load(data: DataConfig, seed: int = 0) -> Images:
    """`load_images` with these settings."""
    return load_images(
        data.name,
        data.root,
        source_size=data.source_size,
        limit_train=data.limit_train,
        limit_test=data.limit_test,
        val_fraction=data.val_fraction,
        seed=seed,
        cache=data.cache,
        unreadable=data.unreadable,
    )


def write_unreadable(folder: Path, unreadable: Mapping[str, str]) -> None:
    """Write `folder/unreadable.jsonl`: the files that were left out, with the reason. Without any, no file."""
    if not unreadable:
        (folder / "unreadable.jsonl").unlink(missing_ok=True)  # of an earlier run there
    else:
        lines = [json.dumps(dict(file=file, reason=reason)) for file, reason in unreadable.items()]
        write_atomically(folder / "unreadable.jsonl", "".join(f"{line}\n" for line in lines).encode())


def check_source(
    name: str, root: str | os.PathLike[str] | None = None, cache: str = "auto", unreadable: str = "error"
) -> None:
    """Refuse, without reading any data, an unknown source and settings that it does not take."""
    kind, colon, what = name.partition(":")
    if kind not in SOURCES or (kind == "hf") != bool(what):
        raise unknown("data source", name, [*(s for s in SOURCES if s != "hf"), "hf:<name>"])
    if colon and root:
        raise ConfigError(f"{name} says where the data are: leave out root, got {root}")
    if cache not in CACHES:
        raise unknown("data.cache", cache, CACHES)
    if cache == "none" and kind not in FOLDERS:
        raise ConfigError(f"data.cache none is of files in class folders ({', '.join(FOLDERS)}); {name} is in memory")
    if unreadable not in UNREADABLE:
        raise unknown("data.unreadable", unreadable, UNREADABLE)
    if unreadable == "skip" and kind not in FOLDERS:
        raise ConfigError(f"data.unreadable skip is of files in class folders ({', '.join(FOLDERS)}), not of {name}")


def check_data(data: DataConfig) -> None:
    """Refuse settings that cannot work, without reading any data."""
    check_source(data.name, data.root, data.cache, data.unreadable)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std of float images (B, C, H, W), by channel.

    Raises:
        ConfigError: if there are not C means and C stds.
    """
    if not len(mean) == len(std) == images.shape[1]:  # one channel would quietly broadcast to three
        raise ConfigError(f"images have {images.shape[1]} channels, mean {len(mean)} and std {len(std)} values")
    by_channel = (1, -1, 1, 1)
    return (images - images.new_tensor(mean).view(by_channel)) / images.new_tensor(std).view(by_channel)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of every channel in [0, 1], float64; from histograms of the 256 values, hence exact and quick."""
    value = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = share @ value
        means.append(mean.item())
        # A constant channel says nothing: divided by 1 it stays at zero, by 0 it would be NaN.
        stds.append((share @ (value - mean).square()).sqrt().item() or 1.0)
    return tuple(means), tuple(stds)


def _shared(train: Split, test: Split) -> int:
    """Images of test whose pixels are those of an image of train."""
    seen = [image.tobytes() for image in test.images.numpy()]
    leaked = set(seen).intersection(image.tobytes() for image in train.images.numpy())
    return sum(image in leaked for image in seen)


__all__ = ["SOURCES", "Images", "Split", "load", "load_images", "normalize", "resize"]
