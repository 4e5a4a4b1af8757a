"""Sources of images: each reads the files of one kind of layout, or a dataset of another library.

Legend: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, install
from ..files import cache_dir
from ..spec import Size
from . import archives
from .decode import check_fit
from .folders import HOW
from .image_cache import Reasons, check_one_size, check_size, find_unreadable, first_readable, load_files
from .label_files import list_csv
from .layout import Layout, list_folders
from .splits import FileSplit, Split

TOLERATED = 0.01, 10  # of the files of a split: more than this share and more than this number is no accident


class SourceData(NamedTuple):
    """The data of a source.

    Args:
        classes: class names; a label is an index into them. None for images alone.
        train, test, val: the splits, of one image size; test and val may be missing.
        notes: remarks for the user, a line each.
        unreadable: the files of each split that were left out, with the reason.
    """

    classes: tuple[str, ...]
    train: Split | FileSplit
    test: Split | FileSplit | None
    notes: list[str]
    unreadable: Mapping[str, Mapping[str, str]] = {}
    val: Split | FileSplit | None = None


class Reading(NamedTuple):
    """How files become images.

    Args:
        source_size: (H, W) that every image is brought to; None: they all have one size already.
        fit: in which way, see `decode.decode`.
        cache: memory: decoded once and kept; none: left on disk; auto: memory where it is large enough.
        unreadable: error, or skip: files that cannot be read are left out.
        labels: whether classes are needed.
    """

    source_size: Size | None = None
    fit: str = "crop"
    cache: str = "memory"
    unreadable: str = "error"
    labels: bool = True


Source = Callable[[Path | None, Reading], SourceData]


def digits(root: Path | None, how: Reading) -> SourceData:
    """scikit-learn's 1,797 handwritten digits, 8x8, one channel; a fixed stratified split, 1,437 and 360."""
    if root or how.source_size:
        raise ConfigError("digits come with scikit-learn, 8x8: leave out root and source_size")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(f"digits need scikit-learn ({error}): {install('recipes')}") from error
    data = load_digits()
    images = torch.from_numpy(data.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    parts = train_test_split(torch.arange(len(labels)).numpy(), test_size=360, random_state=0, stratify=labels)
    train, test = (Split(images[part], labels[part]) for part in parts)
    return SourceData(tuple(str(name) for name in data.target_names), train, test, [])


def cifar(name: str, root: Path | None, how: Reading) -> SourceData:
    """CIFAR10 or CIFAR100 of torchvision, downloaded into `root` (None: the cache folder) unless it is there already.

    Its batches are pickles; torchvision compares each with its known checksum before it is opened.
    """
    if how.source_size:
        raise ConfigError(f"{name.lower()} is 32x32: leave out source_size")
    try:
        from torchvision import datasets

        root = root or cache_dir() / name.lower()
        train, test = (getattr(datasets, name)(root, train=part, download=True) for part in (True, False))
    except Exception as error:  # no network, a broken transfer, a wrong checksum, a torchvision built for another torch
        raise DataError(
            f"could not get {name.replace('CIFAR', 'CIFAR-')} with "
            f"torchvision.datasets.{name}({str(root)!r}, download=True): {error}; "
            "without internet, use images in class folders: --data folder --root <folder>"
        ) from error
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return SourceData(tuple(train.classes), splits[0], splits[1], [])


def lay_out(kind: str, root: Path | None, labels: bool = True) -> Layout:
    """Where the images of a folder, a CSV or archives lie.

    Args:
        kind: a name in `FILES`.
        root: the folder, the CSV, or the folder of the archives.
        labels: whether classes are needed.
    """
    if root is None and kind == "tar":
        raise DataError(f"tar needs to know where: --data.root <root>; {archives.LAYOUT}")
    if root is None:
        raise DataError(f"{kind} needs to know where: --root <root>; {HOW}")
    if kind == "csv":
        return list_csv(root, labels=labels)
    return list_folders(archives.unpack(root) if kind == "tar" else root, labels=labels)


def files(kind: str, root: Path | None, how: Reading) -> SourceData:
    """Class folders (`layout.list_folders`), a CSV of paths and labels (`label_files.list_csv`), or archives.

    The classes are those of train, by name; the other splits must have the same. Images become RGB. To skip files of
    what stays on disk, all are decoded once beforehand.
    """
    check_size(how.source_size)
    check_fit(how.fit)
    layout = lay_out(kind, root, how.labels)
    names, numbers, counts = list[str](), list[int](), list[int]()
    for listing in layout.splits.values():
        before = len(names)
        for label, inside in enumerate(listing.get(name, []) for name in layout.splits["train"]):
            names += inside
            numbers += [label] * len(inside)
        counts.append(len(names) - before)
    size, skip, where = how.source_size, how.unreadable == "skip", layout.root
    labels, splits = torch.tensor(numbers), dict[str, Split | FileSplit]()
    sizes = dict(zip(layout.splits, counts, strict=True))
    large = None if how.cache == "memory" else _too_large(where, names, how)
    if large is not None:
        native, more = large
        images, wrong = None, find_unreadable(where, names, size) if skip else {}
    else:
        images, more, wrong = load_files(where, names, size, skip=skip, fit=how.fit)
        native = images.shape[2], images.shape[3]
    named, start = np.array([os.fsencode(name) for name in names]), 0
    for split, part in readable(wrong, names, labels, sizes).items():
        on_disk = FileSplit(where, named[part], labels[part], size, native, native, how.fit)
        stop = start + len(part)
        splits[split] = on_disk if images is None else Split(images[start:stop], on_disk.labels, on_disk)
        start = stop
    at = torch.arange(len(names)).split(counts)
    lost = {
        split: {names[i]: wrong[i] for i in part.tolist() if i in wrong}
        for split, part in zip(layout.splits, at, strict=True)
    }
    notes = [*layout.notes, *more]
    return SourceData(layout.classes, splits["train"], splits.get("test"), notes, lost, splits.get("val"))


def _too_large(root: Path, names: list[str], how: Reading) -> tuple[Size, list[str]] | None:
    """(H, W) of the images and a note, if they are to stay on disk."""
    _, native = first_readable(root, names, how.source_size, how.unreadable == "skip", how.fit)
    need, free = len(names) * native.size, free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if how.cache != "none" and need <= free / 2:
        return None
    if how.source_size is None:
        check_one_size(root, names, native)
    note = f"{len(names)} images stay on disk and are decoded as they are needed: {need / 2**30:.1f} GB"
    return (native.shape[0], native.shape[1]), [note]


def readable(wrong: Reasons, names: list[str], labels: Tensor, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The indices of the readable files of each split.

    Args:
        wrong: the reasons for those that are not.
        names, labels: of all files, split after split.
        counts: how many files each split has.

    Raises:
        DataError: if a class has none of them, or if more are unreadable than a few damaged files explain.
    """
    good = torch.tensor([i not in wrong for i in range(len(names))], dtype=torch.bool)
    parts = dict(zip(counts, torch.arange(len(names)).split(list(counts.values())), strict=True))
    for split, part in parts.items():
        lost = part[~good[part]]
        if len(lost) == 0:
            continue
        example = f"{names[lost[0]]} ({wrong[int(lost[0])]})"
        share, number = TOLERATED
        if len(lost) > number and len(lost) > share * len(part):
            raise DataError(
                f"{len(lost)} of {len(part)} images of {split} cannot be read, more than {share:.0%}: that is no "
                f"accident; among them {example}"
            )
        if gone := set(labels[part].tolist()) - set(labels[part[good[part]]].tolist()):
            first = int(lost[labels[lost] == min(gone)][0])
            raise DataError(
                f"of {len(gone)} classes no image is left that can be read; among them {names[first]} ({wrong[first]})"
            )
    return {split: part[good[part]] for split, part in parts.items()}


def free_memory() -> int:
    """Free memory in bytes, of this machine or of the container that limits it."""
    free = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # a container's limit, where there is one
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free.append(int((group / "memory.max").read_text()) - used)
    with suppress(ValueError, OSError, AttributeError):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=2**33)


def hf(root: Path | None, how: Reading) -> SourceData:
    """A dataset of the Hugging Face hub: `hf:<name>`, or `hf:<name>?image=<column>&label=<column>`."""
    classes, splits, notes = archives.from_hub(str(root), how.source_size, how.fit, labels=how.labels)
    found = {split: Split(*part) for split, part in splits.items()}
    return SourceData(classes, found["train"], found.get("test"), notes, val=found.get("val"))


FILES = ("folder", "csv", "tar")  # sources whose images are files, and can stay on disk
CACHES = ("auto", "memory", "none")
UNREADABLE = ("error", "skip")
SOURCES: dict[str, Source] = {
    "digits": digits, **{kind: partial(files, kind) for kind in FILES}, "hf": hf,
    "cifar10": partial(cifar, "CIFAR10"), "cifar100": partial(cifar, "CIFAR100"),
}  # fmt: skip
