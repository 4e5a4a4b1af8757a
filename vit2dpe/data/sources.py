"""Sources of images: each reads the files of one kind of layout, or a dataset of another library.

Legend: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..files import cache_dir
from ..spec import Size
from . import archives
from .folders import LAYOUT, list_folders
from .image_cache import Reasons, check_size, find_unreadable, first_readable, load_files
from .splits import FileSplit, Split

TOLERATED = 0.01, 10  # of the files of a split: more than this share and more than this number is no accident


class SourceData(NamedTuple):
    """The data of a source.

    Args:
        classes: class names; a label is an index into them.
        train, test: the two splits, of one image size; test may be missing.
        notes: remarks for the user, a line each.
        unreadable: the files of train and of test that were left out, with the reason.
    """

    classes: tuple[str, ...]
    train: Split | FileSplit
    test: Split | FileSplit | None
    notes: list[str]
    unreadable: tuple[dict[str, str], dict[str, str]] = ({}, {})


Source = Callable[..., SourceData]  # of root and source_size


def digits(root: Path | None, source_size: Size | None) -> SourceData:
    """scikit-learn's 1,797 handwritten digits, 8x8, one channel; a fixed stratified split, 1,437 and 360."""
    if root or source_size:
        raise ConfigError("digits come with scikit-learn, 8x8: leave out root and source_size")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(f'digits need scikit-learn ({error}): pip install "vit2dpe[recipes]"') from error
    data = load_digits()
    images = torch.from_numpy(data.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    parts = train_test_split(torch.arange(len(labels)).numpy(), test_size=360, random_state=0, stratify=labels)
    train, test = (Split(images[part], labels[part]) for part in parts)
    return SourceData(tuple(str(name) for name in data.target_names), train, test, [])


def cifar(name: str, root: Path | None, source_size: Size | None) -> SourceData:
    """CIFAR10 or CIFAR100 of torchvision, downloaded into `root` (None: the cache folder) unless it is there already.

    Its batches are pickles; torchvision compares each with its known checksum before it is opened.
    """
    if source_size:
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


def folder(
    root: Path | None,
    source_size: Size | None,
    *,
    tar: bool = False,
    cache: str = "memory",
    alone: bool = False,
    unreadable: str = "error",
) -> SourceData:
    """Class folders: `root/train/<class>/*`, and `root/val` or `root/test` likewise (val, where there are both).

    Tiny-ImageNet as it is downloaded is read too: `train/<class>/images/*`, `val/images/*` with val_annotations.txt.
    The classes are those of train, by name; the other split must have the same. Images become RGB.

    Args:
        tar: one archive a split instead: `root/train.tar` and `root/val.tar` (or test), in each `<class>/<image>`.
        cache: as in `load_images`.
        alone: whether train may be the only split.
        unreadable: as in `load_images`. To skip files of what stays on disk, all are decoded once beforehand.
    """
    if root is None and tar:
        raise DataError(f"tar needs to know where: --data.root <root>; {archives.LAYOUT}")
    if root is None:
        raise DataError(f"folder needs to know where: --root <root>; {LAYOUT}")
    check_size(source_size)
    if tar:
        root = archives.unpack(root, alone=alone)
    train, test, notes = list_folders(root, alone=alone)
    names, numbers = [], []
    for listing in (train, test):
        for label, files in enumerate(listing.get(name, []) for name in train):
            names += files
            numbers += [label] * len(files)
    labels, cut, skip = torch.tensor(numbers), sum(map(len, train.values())), unreadable == "skip"
    splits: list[Split | FileSplit]
    if cache != "memory" and (large := _too_large(root, names, source_size, cache, skip)):
        size, more = large
        wrong = find_unreadable(root, names, source_size) if skip else {}
        parts = readable(wrong, names, labels, cut)
        named = np.array([os.fsencode(name) for name in names])
        splits = [FileSplit(root, named[part], labels[part], source_size, size, size) for part in parts]
    else:
        images, more, wrong = load_files(root, names, source_size, skip=skip)
        parts = readable(wrong, names, labels, cut)
        splits = [Split(images[: len(parts[0])], labels[parts[0]]), Split(images[len(parts[0]) :], labels[parts[1]])]
    reasons = [{names[i]: wrong[i] for i in sorted(wrong) if (i < cut) == first} for first in (True, False)]
    return SourceData(tuple(train), splits[0], splits[1] if test else None, [*notes, *more], (reasons[0], reasons[1]))


def _too_large(
    root: Path, names: list[str], source_size: Size | None, cache: str, skip: bool
) -> tuple[Size, list[str]] | None:
    """(H, W) of the images and a note, if they are to stay on disk."""
    _, native = first_readable(root, names, source_size, skip)
    need, free = len(names) * native.size, free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cache != "none" and need <= free / 2:
        return None
    note = f"{len(names)} images stay on disk and are decoded as they are needed: {need / 2**30:.1f} GB"
    return (native.shape[0], native.shape[1]), [note]


def readable(wrong: Reasons, names: list[str], labels: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """The indices of the readable files of train and of the other split.

    Raises:
        DataError: if a class has none of them, or if more are unreadable than a few damaged files explain.
    """
    splits = torch.arange(len(names)).tensor_split([cut])
    good = torch.tensor([i not in wrong for i in range(len(names))], dtype=torch.bool)
    for part in splits:
        lost = part[~good[part]]
        if len(lost) == 0:
            continue
        example = f"{names[lost[0]]} ({wrong[int(lost[0])]})"
        share, number = TOLERATED
        if len(lost) > number and len(lost) > share * len(part):
            raise DataError(
                f"{len(lost)} of {len(part)} images of {names[lost[0]].partition('/')[0]} cannot be read, more than "
                f"{share:.0%}: that is no accident; among them {example}"
            )
        if gone := set(labels[part].tolist()) - set(labels[part[good[part]]].tolist()):
            first = int(lost[labels[lost] == min(gone)][0])
            raise DataError(
                f"of {len(gone)} classes no image is left that can be read; among them {names[first]} ({wrong[first]})"
            )
    train, held_out = (part[good[part]] for part in splits)
    return train, held_out


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


def hf(root: Path | None, source_size: Size | None) -> SourceData:
    """A dataset of the Hugging Face hub: `hf:<name>`."""
    classes, train, test, notes = archives.from_hub(str(root), source_size)
    return SourceData(classes, Split(*train), Split(*test), notes)


FOLDERS = ("folder", "tar")  # sources whose images can stay on disk
CACHES = ("auto", "memory", "none")
UNREADABLE = ("error", "skip")
SOURCES: dict[str, Source] = {
    "digits": digits, "folder": folder, "tar": partial(folder, tar=True), "hf": hf,
    "cifar10": partial(cifar, "CIFAR10"), "cifar100": partial(cifar, "CIFAR100"),
}  # fmt: skip
