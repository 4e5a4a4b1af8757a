"""Labelled images in memory: where they come from, what is known about them, and how a batch becomes an input.

Legend: N images, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, DataError, unknown
from . import archives
from .folders import LAYOUT, list_folders
from .images import cache_dir, load_files


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W) and their labels int64 (N,), on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, n: int) -> Split:
        """n images, as many of every class as there are (the first classes one more); all of them if n is larger.

        The same n always gives the same images, in their old order, and a smaller n some of those of a larger one.

        Raises:
            ConfigError: if n < 1.
        """
        if n < 1:
            raise ConfigError(f"a limit must be at least 1 image, got {n}; None takes all of them")
        if n >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        order = order[self.labels[order].argsort(stable=True)]  # class by class, shuffled within each
        counts = self.labels.bincount()
        rank = torch.arange(len(self)) - (counts.cumsum(0) - counts)[self.labels[order]]
        index = order[rank.argsort(stable=True)[:n]].sort().values
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Args:
        name: its source.
        classes: class names; a label is an index into them.
        train, test: the two splits, of one image size.
        mean, std: of every channel over the pixels of `train`, for images in [0, 1].
        digest: sha256 of the images and labels of both splits: equal digests, equal data.
        notes: what a person should be told about the data.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    notes: tuple[str, ...]

    @property
    def native(self) -> tuple[int, int]:
        """(H, W) of the stored images."""
        return self.train.images.shape[2], self.train.images.shape[3]


Loaded = tuple[tuple[str, ...], Split, Split, list[str]]  # classes, train, test, notes
Source = Callable[[Path | None, tuple[int, int] | None], Loaded]  # of root and source_size


def load_images(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    source_size: tuple[int, int] | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Images:
    """Load a data set into memory.

    Args:
        name: a key of `SOURCES`.
        root: where it lies; see the source.
        source_size: (H, W) that the images of a `folder` are brought to in decoding.
        limit_train, limit_test: keep a balanced part of this many images (`Split.take`).

    Raises:
        ConfigError: for an unknown name, or a setting that the source does not take.
        DataError: for data that are missing, unreadable or not laid out as required.
    """
    check_source(name)
    source = SOURCES[name.partition(":")[0]]
    at = name.partition(":")[2] or root
    classes, train, test, notes = source(Path(at).expanduser() if at else None, source_size)
    train = train if limit_train is None else train.take(limit_train)
    test = test if limit_test is None else test.take(limit_test)
    with ThreadPoolExecutor(1) as beside:  # hashing lets go of the interpreter
        digest = beside.submit(_digest, train, test)
        mean, std = _statistics(train.images)
        if leaked := _shared(train, test):
            notes = [*notes, f"same image in train and test: {leaked}"]
    return Images(name, classes, train, test, mean, std, digest.result(), tuple(notes))


def check_source(name: str, root: str | os.PathLike[str] | None = None) -> None:
    """Refuse a source that does not exist, without reading any."""
    kind, colon, what = name.partition(":")
    if kind not in SOURCES or (kind == "hf") != bool(what):
        raise unknown("data source", name, [*(s for s in SOURCES if s != "hf"), "hf:<name>"])
    if colon and root:
        raise ConfigError(f"{name} says where the data are: leave out root, got {root}")


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


def folder(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
    """Class folders: `root/train/<class>/*`, and `root/val` or `root/test` likewise (val, where there are both).

    Tiny-ImageNet as it is downloaded is read too: `train/<class>/images/*`, `val/images/*` with val_annotations.txt.
    The classes are those of train, by name; the other split must have the same. Images become RGB.
    """
    if root is None:
        raise DataError(f"folder needs to know where: --root <root>; {LAYOUT}")
    train, test, notes = list_folders(root)
    names, labels = [], []
    for listing in (train, test):
        for label, files in enumerate(listing[name] for name in train):
            names += files
            labels += [label] * len(files)
    images, said = load_files(root, names, source_size)
    split, target = sum(map(len, train.values())), torch.tensor(labels)
    return tuple(train), Split(images[:split], target[:split]), Split(images[split:], target[split:]), notes + said


def tar(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
    """One archive a split: `root/train.tar` and `root/val.tar` (or test), in each `<class>/<image>`."""
    if root is None:
        raise DataError(f"tar needs to know where: --data.root <root>; {archives.LAYOUT}")
    return folder(archives.unpack(root), source_size)


def hf(root: Path | None, source_size: tuple[int, int] | None) -> Loaded:
    """A dataset of Hugging Face's: `hf:<name>`."""
    classes, train, test, notes = archives.from_hub(str(root), source_size)
    return classes, Split(*train), Split(*test), notes


SOURCES: dict[str, Source] = {
    "digits": digits, "folder": folder, "tar": tar, "cifar10": cifar10, "cifar100": cifar100, "hf": hf,
}  # fmt: skip


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) uint8, or float in [0, 1], to (B, C, H, W) float in [0, 1]: bicubic, antialiased, clamped.

    At their own size images keep their exact values.
    """
    images = images if images.is_floating_point() else images.float() / 255
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


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


def _digest(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _shared(train: Split, test: Split) -> int:
    """Images of test whose pixels are those of an image of train."""
    seen = [image.tobytes() for image in test.images.numpy()]
    leaked = set(seen).intersection(image.tobytes() for image in train.images.numpy())
    return sum(image in leaked for image in seen)
