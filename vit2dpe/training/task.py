"""What the training loop is told about a problem: its batches, its loss, its evaluation. The loop knows nothing else.

Classes of this shape, one file each, are image classification, masked images, language modelling and others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..seeding import generator
from .distributed import World

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

    def close(self) -> None:
        """Let go of processes and files; called when a training ends, however it ends. Most tasks hold none."""
        return

    def count(self, batch: Batch) -> int:
        """How many items the loss is the mean of; the first dimension of the first tensor, if not overridden."""
        return len(tensors_of(batch)[0])


def describe_data(task: str, data: Any, **more: Any) -> dict[str, Any]:
    """What every task says of itself and its data, and `more`."""
    return dict(task=task, data=data.name, digest=data.digest) | more


def count_steps(count: int, batch_size: int, world: World) -> int:
    """How many steps an epoch over `count` items has.

    A rest smaller than the number of processes would leave one with nothing to do: it is left out.
    """
    whole, rest = divmod(count, batch_size)
    return whole + (rest >= world.size or (rest > 0 and whole == 0))


def batch_indices(count: int, batch_size: int, seed: int, epoch: int, step: int) -> Tensor:
    """The numbers of a step's items, of all ranks: each item once an epoch, in an order drawn anew for each."""
    return _order(count, seed, epoch)[step * batch_size : (step + 1) * batch_size]


@lru_cache(maxsize=2)  # of this epoch, and of the next one for what is read ahead
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch, "order"))


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
