"""The images of one split with their labels, in memory or on disk; `FileSplit` reads its files when they are indexed.

Legend: N images, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, DataError
from ..seeding import generator
from ..spec import Size
from .decode import decode

SAMPLE = 2048  # images that mean and deviation are estimated from, where not all are in memory


class LabelledDataset:
    """Base class of labelled datasets: items with labels int64 (N,), and balanced subsets of them."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Self:
        """The items of these indices, in this order."""
        raise NotImplementedError(f"{type(self).__name__} must implement select")

    def subsample(self, n: int, without: Collection[int] = ()) -> Self:
        """n images, as many of every class as there are (the first classes one more); all of them if n is larger.

        Deterministic: the same n gives the same images, in their old order, and a smaller n a subset of those.

        Args:
            without: indices that are excluded; each is replaced by the next item of its class, the others stay.

        Raises:
            ConfigError: if n < 1.
        """
        if n < 1:
            raise ConfigError(f"a limit must be at least 1 image, got {n}; None takes all of them")
        if n >= len(self) and not without:
            return self
        rank, order = self._ranks(torch.Generator().manual_seed(0), without)
        return self.select(order[rank.argsort(stable=True)[:n]].sort().values)

    def hold_out(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """(rest, held out): held out is this fraction of each class (rounded, 1 to all but one), drawn by `seed`.

        Raises:
            ConfigError: for a fraction outside (0, 1), and for a class of a single image.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"data.val_fraction is a part of the training images, in (0, 1), got {fraction}")
        counts = self.labels.bincount()
        if (counts == 1).any():
            alone = int((counts == 1).nonzero()[0])
            raise ConfigError(f"data.val_fraction needs two images of every class; class {alone} has one")
        rank, order = self._ranks(generator(seed, "validation"))
        wanted = torch.minimum((counts * fraction).round().long().clamp(min=1), (counts - 1).clamp(min=0))
        held = torch.zeros(len(self), dtype=torch.bool)
        held[order] = rank < wanted[self.labels[order]]
        return self.select((~held).nonzero()[:, 0]), self.select(held.nonzero()[:, 0])

    def _ranks(self, draws: torch.Generator, without: Collection[int] = ()) -> tuple[Tensor, Tensor]:
        """The rank of each item within its class, and the items in a shuffled order, class by class."""
        order = torch.randperm(len(self), generator=draws)
        order = order[~torch.isin(order, torch.tensor(list(without), dtype=torch.long))]
        order = order[self.labels[order].argsort(stable=True)]
        counts = self.labels[order].bincount()
        return torch.arange(len(order)) - (counts.cumsum(0) - counts)[self.labels[order]], order


@dataclass(frozen=True)
class Split(LabelledDataset):
    """Images uint8 (N, C, H, W) and their labels int64 (N,), on the CPU.

    Args:
        origin: the files that the images were decoded from; None: they come from elsewhere.
    """

    images: Tensor
    labels: Tensor
    origin: FileSplit | None = None

    @property
    def size(self) -> Size:
        """(H, W)"""
        return self.images.shape[2], self.images.shape[3]

    def select(self, index: Tensor) -> Split:
        origin = None if self.origin is None else self.origin.select(index)
        return Split(self.images[index], self.labels[index], origin)

    def pixels(self, index: Tensor) -> Tensor:
        """uint8 (B, C, H, W)"""
        return self.images[index]

    def sample(self) -> Tensor:
        """uint8 images that mean and deviation are computed from: all."""
        return self.images

    def resized(self, size: Size) -> Split:
        return replace(self, images=resized(self.images, size))

    def content(self) -> Iterator[bytes | memoryview]:
        """What the digest is taken of: pixels and labels."""
        for tensor in (self.images, self.labels):
            yield f"{tensor.dtype} {tuple(tensor.shape)}\n".encode()
            yield tensor.contiguous().numpy().data


@dataclass(frozen=True)
class FileSplit(LabelledDataset):
    """Image files, decoded each time they are indexed; `loader.stream` decodes them ahead in worker processes.

    Args:
        root: the folder that names are relative to.
        names: (N,) bytes; an array, so that reading it in a forked process copies no memory.
        labels: int64 (N,).
        source: (H, W) that every image is brought to in decoding; None: they all have one size.
        native: (H, W) of a decoded image.
        size: (H, W) of `pixels`, brought from `native` (bicubic) where it differs.
        fit: how an image is brought to `source`, see `decode`.
    """

    root: Path
    names: np.ndarray
    labels: Tensor
    source: Size | None
    native: Size
    size: Size
    fit: str = "crop"

    def select(self, index: Tensor) -> FileSplit:
        return replace(self, names=self.names[index.numpy()], labels=self.labels[index])

    def path(self, index: int) -> str:
        return f"{self.root}/{os.fsdecode(self.names[index])}"

    def pixels(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W)

        Raises:
            DataError: naming the first file that cannot be read, or that is of another size.
        """
        return torch.cat([self.read(int(i)) for i in index]) if len(index) else torch.empty(0, 3, *self.size).byte()

    def read(self, index: int) -> Tensor:
        """One image, uint8 (1, 3, H, W)."""
        path = self.path(index)
        image = torch.from_numpy(np.ascontiguousarray(decode(path, self.source, self.fit)[0].transpose(2, 0, 1)))[None]
        if tuple(image.shape[2:]) != self.native:
            raise DataError(
                f"the images differ in size: {path} is {image.shape[2]}x{image.shape[3]}, others are "
                f"{self.native[0]}x{self.native[1]} (rows x columns); --data.source_size brings them to one"
            )
        return resized(image, self.size)

    def sample(self) -> Tensor:
        """uint8 images that mean and deviation are estimated from: 2,048 of them, always the same."""
        return self.pixels(torch.randperm(len(self), generator=generator("statistics"))[:SAMPLE])

    def resized(self, size: Size) -> FileSplit:
        return replace(self, size=size)

    def content(self) -> Iterator[bytes]:
        """What the digest is taken of: names, labels and lengths of the files, not their pixels."""
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            length = os.stat(os.path.join(os.fsencode(self.root), name)).st_size
            yield name + f"\0{label} {length}\n".encode()
        if self.fit != "crop":
            yield f"fit {self.fit}\n".encode()


def resize(images: Tensor, size: Size) -> Tensor:
    """(B, C, h, w) uint8, or float in [0, 1], to (B, C, H, W) float in [0, 1]: bicubic, antialiased, clamped.

    At their own size images keep their exact values.
    """
    images = images if images.is_floating_point() else images.float() / 255
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def scaled(images: Tensor, size: Size, crop: float = 1.0) -> Tensor:
    """Normalised images (B, C, h, w) at (H, W), bicubic, antialiased; `crop`: of the centre share of each side."""
    if crop < 1:
        h, w = (max(1, round(side * crop)) for side in images.shape[-2:])
        top, left = (images.shape[-2] - h) // 2, (images.shape[-1] - w) // 2
        images = images[..., top : top + h, left : left + w]
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def resized(images: Tensor, size: Size) -> Tensor:
    """uint8 images at another size."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return torch.cat([(resize(part, size) * 255).round().to(torch.uint8) for part in images.split(1024)])
