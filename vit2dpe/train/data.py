"""Labelled images: where they come from, what is known about them, and how a batch becomes an input.

Legend: N images, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, unknown
from ..resolution import parse_size
from . import archives
from .folders import LAYOUT, list_folders
from .images import cache_dir, decode, load_files
from .settings import DataConfig
from .splits import FileSplit, Split, digest_of, resize


@dataclass(frozen=True)
class Images:
    """A data set, in memory or on disk.

    Args:
        name: its source.
        classes: class names; a label is an index into them.
        train, test: the two splits, of one image size.
        mean, std: of every channel over the pixels of `train`, for images in [0, 1].
        digest: sha256 of all splits: equal digests, equal data.
        notes: what a person should be told about the data.
        val: what `val_fraction` held out of training: early stopping and `best/` go by it, never by `test`.
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

    @property
    def native(self) -> tuple[int, int]:
        """(H, W) of the stored images."""
        return self.train.size

    @property
    def held_out(self) -> dict[str, Split | FileSplit]:
        """What is evaluated, by name; the first decides which weights are best."""
        return ({} if self.val is None else {"val": self.val}) | {"test": self.test}


# classes, train, test (None where there is none), notes
Loaded = tuple[tuple[str, ...], Split | FileSplit, Split | FileSplit | None, list[str]]
Source = Callable[..., Loaded]  # of root and source_size


def load_images(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    source_size: tuple[int, int] | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    cache: str = "memory",
) -> Images:
    """Load a data set.

    Args:
        name: a key of `SOURCES`.
        root: where it lies; see the source.
        source_size: (H, W) that the images of a `folder` are brought to in decoding.
        limit_train, limit_test: keep a balanced part of this many images (`Labelled.take`).
        val_fraction: hold out this part of every class of the training images, drawn by `seed`, as `Images.val`;
            where a `folder` has no held-out split, as `Images.test`.
        cache: memory: decoded once and kept; none: decoded from files each time, by worker processes (`stream.py`);
            auto: memory where it is large enough.

    Raises:
        ConfigError: for an unknown name, or a setting that the source does not take.
        DataError: for data that are missing, unreadable or not laid out as required.
    """
    check_source(name, cache=cache)
    kind, _, what = name.partition(":")
    at, source = what or root, SOURCES[kind]
    if kind in FOLDERS:
        more: dict[str, Any] = dict(cache=cache, alone=val_fraction > 0)
        source = partial(source, **more)
    classes, train, test, notes = source(Path(at).expanduser() if at else None, source_size)
    train = train if limit_train is None else train.take(limit_train)
    val: Split | FileSplit | None = None
    if val_fraction:
        train, val = train.parted(val_fraction, seed)
        said = f"validation: {len(val)} images, {val_fraction:g} of every class of train, by seed {seed}"
        notes = [*notes, f"{said}; there is no other held-out split" if test is None else said]
    if test is None:
        test, val = cast(Split, val), None
    test = test if limit_test is None else test.take(limit_test)
    with ThreadPoolExecutor(1) as beside:  # hashing lets go of the interpreter
        digest = beside.submit(digest_of, *(split for split in (train, test, val) if split is not None))
        mean, std = _statistics(train.sample())
        if isinstance(train, Split) and isinstance(test, Split) and (leaked := _shared(train, test)):
            notes = [*notes, f"same image in train and test: {leaked}"]
    return Images(name, classes, train, test, mean, std, digest.result(), tuple(notes), val)


def load(data: DataConfig, seed: int = 0) -> Images:
    """`load_images` as these settings say."""
    return load_images(
        data.name,
        data.root,
        source_size=None if data.source_size is None else parse_size(data.source_size),
        limit_train=data.limit_train,
        limit_test=data.limit_test,
        val_fraction=data.val_fraction,
        seed=seed,
        cache=data.cache,
    )


def check_source(name: str, root: str | os.PathLike[str] | None = None, cache: str = "auto") -> None:
    """Refuse a source that does not exist, or cannot be kept as `cache` says, without reading any."""
    kind, colon, what = name.partition(":")
    if kind not in SOURCES or (kind == "hf") != bool(what):
        raise unknown("data source", name, [*(s for s in SOURCES if s != "hf"), "hf:<name>"])
    if colon and root:
        raise ConfigError(f"{name} says where the data are: leave out root, got {root}")
    if cache not in CACHES:
        raise unknown("data.cache", cache, CACHES)
    if cache == "none" and kind not in FOLDERS:
        raise ConfigError(f"data.cache none is of files in class folders ({', '.join(FOLDERS)}); {name} is in memory")


def check_data(data: DataConfig) -> None:
    """Refuse settings that cannot work, without reading any data."""
    check_source(data.name, data.root, data.cache)
    if not 0 <= data.val_fraction < 1:
        raise ConfigError(f"data.val_fraction is a part of the training images, in [0, 1), got {data.val_fraction}")
    if data.workers is not None and data.workers < 0:
        raise ConfigError(f"data.workers must be 0 or above, got {data.workers}")


def digits(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
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
    return tuple(str(name) for name in data.target_names), train, test, []


def cifar10(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
    """CIFAR-10 through torchvision, downloaded into `root` (None: the cache folder) unless it is there already.

    Its batches are pickles; torchvision compares each with its known checksum before it is opened.
    """
    return _cifar("CIFAR10", root, source_size)


def cifar100(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
    """CIFAR-100, as `cifar10`."""
    return _cifar("CIFAR100", root, source_size)


def _cifar(name: str, root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
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
    return tuple(train.classes), splits[0], splits[1], []


def folder(
    root: Path | None, source_size: tuple[int, int] | None, *, cache: str = "memory", alone: bool = False
) -> Loaded:
    """Class folders: `root/train/<class>/*`, and `root/val` or `root/test` likewise (val, where there are both).

    Tiny-ImageNet as it is downloaded is read too: `train/<class>/images/*`, `val/images/*` with val_annotations.txt.
    The classes are those of train, by name; the other split must have the same. Images become RGB.

    Args:
        cache: as in `load_images`.
        alone: whether train may be the only split.
    """
    if root is None:
        raise DataError(f"folder needs to know where: --root <root>; {LAYOUT}")
    train, test, notes = list_folders(root, alone=alone)
    names, labels = [], []
    for listing in (train, test):
        for label, files in enumerate(listing.get(name, []) for name in train):
            names += files
            labels += [label] * len(files)
    split, target = sum(map(len, train.values())), torch.tensor(labels)
    parts = (slice(split), slice(split, None))
    if cache != "memory":
        native, _ = decode(root / names[0], source_size)
        size = native.shape[0], native.shape[1]
        need, free = len(names) * native.size, free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if cache == "none" or need > free / 2:
            notes.append(f"{len(names)} images stay on disk and are decoded as they are needed: {need / 2**30:.1f} GB")
            named = np.array([os.fsencode(name) for name in names])
            splits = [FileSplit(root, named[part], target[part], source_size, size, size) for part in parts]
            return tuple(train), splits[0], splits[1] if test else None, notes
    images, said = load_files(root, names, source_size)
    kept = [Split(images[part], target[part]) for part in parts]
    return tuple(train), kept[0], kept[1] if test else None, notes + said


def free_memory() -> int:
    """Bytes that this machine, or the container that it is, has free."""
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


def tar(
    root: Path | None, source_size: tuple[int, int] | None, *, cache: str = "memory", alone: bool = False
) -> Loaded:
    """One archive a split: `root/train.tar` and `root/val.tar` (or test), in each `<class>/<image>`."""
    if root is None:
        raise DataError(f"tar needs to know where: --data.root <root>; {archives.LAYOUT}")
    return folder(archives.unpack(root), source_size, cache=cache)


def hf(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
    """A dataset of Hugging Face's: `hf:<name>`."""
    classes, train, test, notes = archives.from_hub(str(root), source_size)
    return classes, Split(*train), Split(*test), notes


FOLDERS = ("folder", "tar")  # sources whose images can stay on disk
CACHES = ("auto", "memory", "none")
SOURCES: dict[str, Source] = {
    "digits": digits, "folder": folder, "tar": tar, "cifar10": cifar10, "cifar100": cifar100, "hf": hf,
}  # fmt: skip


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
