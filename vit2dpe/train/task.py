"""What the training loop is told about a problem: its batches, its loss, its evaluation. The loop knows nothing else.

`ImageTask` is classification; masked pretraining and language modelling are other classes of this shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..resolution import evaluate
from .augment import shift_and_flip
from .data import Images, Split, normalize, resize
from .distributed import ALONE, World, sum_over_ranks
from .keys import generator

Batch = Any  # a tensor, or dicts, lists and tuples of tensors whose first dimension is the sample's


class Task(Protocol):
    """A problem that `engine.fit` can train. Subclass it, and the methods with a body are yours."""

    steps_per_epoch: int
    best: tuple[str, str] | None  # the number of `evaluate` that decides best/, and "max" or "min"
    unit: str = "items"  # what `count` counts; names the column of the throughput

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's share of step `step` of epoch `epoch`, on its device.

        A pure function of (seed, epoch, step, rank): every random draw comes from `keys.generator`, so that a resumed
        run asks for the step it is at and skips nothing. Draws that belong to a sample are made for the whole batch
        and cut to the rank's share, so that two processes train as one does.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The mean loss of a batch, and further numbers to average over the epoch. `model` may be wrapped."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers such as test_top1 and test_loss: the same on every rank, every sample counted once."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a reader of the checkpoint must know (classes, mean, std, digest of the data): JSON values."""
        ...

    def count(self, batch: Batch) -> int:
        """How many items the loss is the mean of; the first dimension of the first tensor, if not overridden."""
        return len(tensors_of(batch)[0])


@dataclass(frozen=True)
class ImageTask(Task):
    """Classification of images that are in memory.

    Args:
        data: images at their native size.
        train_size: (H, W) of training images.
        batch_size: images of a step, over all ranks; the last step of an epoch has the rest.
        seed: of order and augmentation.
        device: where batches go.
        shift, flip: random shift in pixels, random horizontal flip.
        label_smoothing: of the cross-entropy.
        world: this process among how many.
    """

    data: Images
    train_size: tuple[int, int]
    batch_size: int
    seed: int = 0
    device: torch.device | str = "cpu"
    shift: int = 0
    flip: bool = False
    label_smoothing: float = 0.0
    world: World = ALONE
    best: tuple[str, str] | None = ("test_top1", "max")
    unit: str = "images"

    def __post_init__(self) -> None:
        train = Split(resized(self.data.train.images, self.train_size), self.data.train.labels)
        object.__setattr__(self, "train", train)

    @property
    def steps_per_epoch(self) -> int:  # type: ignore[override]
        whole, rest = divmod(len(self.data.train), self.batch_size)
        # A rest smaller than the number of processes would leave one with nothing to do: it is left out.
        return whole + (rest >= self.world.size or (rest > 0 and whole == 0))

    def batch(self, epoch: int, step: int) -> Batch:
        train: Split = self.train  # type: ignore[attr-defined]
        order = torch.randperm(len(train), generator=generator(self.seed, epoch, "order"))
        index = order[step * self.batch_size : (step + 1) * self.batch_size]
        part = self.world.share(len(index))
        draws = generator(self.seed, epoch, step, "augment")
        images = train.images[index[part]].to(self.device, non_blocking=True)
        images = shift_and_flip(images, self.shift, self.flip, draws, of=len(index), part=part)
        images = normalize(images.float() / 255, self.data.mean, self.data.std)
        return dict(images=images, labels=train.labels[index[part]].to(self.device), index=index[part])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        logits = model(batch["images"])
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.label_smoothing), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        score = evaluate(model, evaluation_batches(self.data, self.train_size, world=self.world))
        if self.world.size > 1:
            mine = [score["n"], score["n"] * score["top1"], score["n"] * score["loss"]]
            n, right, loss = sum_over_ranks(mine, self.world, next(model.parameters()).device)
            score = dict(top1=right / n, loss=loss / n)
        return dict(test_top1=score["top1"], test_loss=score["loss"])

    def describe(self) -> dict[str, Any]:
        data = self.data
        return dict(
            task="classification",
            data=data.name,
            digest=data.digest,
            classes=list(data.classes),
            mean=list(data.mean),
            std=list(data.std),
            train_size=list(self.train_size),
        )


def evaluation_batches(
    data: Images, size: tuple[int, int] | None = None, batch: int = 256, world: World = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised test images in order, at their native size or at `size`.

    A rank has its own part of them, in as many batches as every other rank: sharded models meet in each forward pass.
    """
    count = len(data.test)
    cuts = [slice(start, start + batch) for start in range(0, count, batch)]
    if world.size > 1:
        mine, batches = world.share(count), math.ceil(math.ceil(count / world.size) / batch)
        parts = [World(i, batches).share(mine.stop - mine.start) for i in range(batches)]
        cuts = [slice(mine.start + part.start, mine.start + part.stop) for part in parts]
    for cut in cuts:
        images = data.test.images[cut]
        images = resize(images, size or tuple(images.shape[-2:]))  # type: ignore[arg-type]
        yield normalize(images, data.mean, data.std), data.test.labels[cut]


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images at the training size, once."""
    if tuple(images.shape[-2:]) == size:
        return images
    parts = [(resize(part, size) * 255).round().to(torch.uint8) for part in images.split(1024)]
    return torch.cat(parts)


def tensors_of(tree: Batch) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def split_batch(tree: Batch, parts: int) -> list[Batch]:
    """A batch cut along the first dimension into at most `parts` parts, whatever is no tensor in each of them."""
    if parts == 1:
        return [tree]
    size = math.ceil(len(tensors_of(tree)[0]) / parts)

    def cut(node: Batch, start: int) -> Batch:
        if isinstance(node, Tensor):
            return node[start : start + size]
        if isinstance(node, Mapping):
            return {key: cut(value, start) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(cut(value, start) for value in node)
        return node

    return [cut(tree, start) for start in range(0, len(tensors_of(tree)[0]), size)]
