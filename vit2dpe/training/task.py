"""Interface between the training loop and a problem: batches, loss, evaluation.

Image classification, masked images, language modelling and others implement it, one file each in `tasks/`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..data.identity import FILES
from ..data.transfer import onto
from ..errors import ConfigError
from ..seeding import generator
from ..spec import Plain
from .distributed import World

Batch = dict[str, Tensor]  # what the tasks of this library make; the first dimension is the sample's
B = TypeVar("B")  # any other kind: a tensor, or dicts, lists and tuples that hold tensors


class Task(Protocol[B]):
    """A problem that `engine.fit` can train. Subclass it to inherit the methods that have a body."""

    steps_per_epoch: int
    best: tuple[str, str] | None = None  # the number of `evaluate` that decides best/, and "max" or "min"
    unit: str = "items"  # what `count` counts; names the column of the throughput

    @abstractmethod
    def batch(self, epoch: int, step: int) -> B:
        """This rank's share of step `step` of epoch `epoch`, on its device.

        A pure function of (seed, epoch, step, rank): every random draw comes from `seeding.generator`, so that a
        resumed run starts at any step without replaying earlier ones. Draws that belong to a sample are made for the
        whole batch and cut to the rank's share, so that two processes train as one does.
        """
        ...

    @abstractmethod
    def loss(self, model: nn.Module, batch: B) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The mean loss of a batch, and further numbers to average over the epoch. `model` may be wrapped."""
        ...

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Numbers such as test_top1 and test_loss: the same on every rank, every sample counted once."""
        ...

    @abstractmethod
    def describe(self) -> Mapping[str, Plain]:
        """Metadata of the checkpoint (classes, mean, std, digest of the data)."""
        ...

    def close(self) -> None:
        """Release processes and files; called when a training ends, however it ends. Most tasks hold none."""
        return

    def count(self, batch: B) -> int:
        """How many items the loss is the mean of; the first dimension of the first tensor, if not overridden."""
        return len(tensors_of(batch)[0])


class Dataset(Protocol):
    """Data that a task trains on."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


def describe_data(task: str, data: Dataset, **more: Plain) -> dict[str, Plain]:
    """Metadata that all tasks have in common, and `more`."""
    files: str | None = getattr(data, FILES, None)
    return dict(task=task, data=data.name, digest=data.digest) | ({} if files is None else {FILES: files}) | more


def count_steps(count: int, batch_size: int, world: World, drop_last: bool | None = False) -> int:
    """How many steps an epoch over `count` items has.

    A remainder smaller than the number of processes would leave one without any item: it is left out.

    Args:
        drop_last: leave out any remainder; None: but that of an epoch that has nothing else.

    Raises:
        ConfigError: if that leaves nothing.
    """
    full, rest = divmod(count, batch_size)
    if drop_last and not full:
        raise ConfigError(
            f"optim.drop_last leaves nothing to train on: an epoch has {count} items, a batch {batch_size}; give "
            f"--optim.batch_size {max(1, count)} or less, or leave drop_last out"
        )
    if drop_last is not False and full:
        return full
    return full + (rest >= world.size or (rest > 0 and full == 0))


def batch_indices(count: int, batch_size: int, seed: int, epoch: int, step: int) -> Tensor:
    """The indices of a step's items, of all ranks: each item once an epoch, in an order drawn anew for each."""
    return _order(count, seed, epoch)[step * batch_size : (step + 1) * batch_size]


@lru_cache(maxsize=2)  # of this epoch, and of the next one for what is read ahead
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, epoch, "order"))


class BalancedOrder:
    """Indices of the items of an epoch in which every class that has items is drawn equally often.

    With n items of C classes each class is drawn ceil(n / C) times: its items in one order drawn anew after another, so
    that two of them differ by one draw at most, and what an epoch leaves out of a frequent class is another part in
    each. A pure function of (seed, epoch). torch's WeightedRandomSampler draws independently instead: shares of
    classes and items then vary, and some rare items are missed.

    Args:
        labels: int64 (n,).
        seed: of every draw.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        self.seed = seed
        self.classes = {int(label): (labels == label).nonzero()[:, 0] for label in labels.unique()}
        self.share = math.ceil(len(labels) / max(1, len(self.classes)))
        self._of = lru_cache(maxsize=2)(self._drawn)

    def __len__(self) -> int:
        return self.share * len(self.classes)

    def batch(self, batch_size: int, epoch: int, step: int) -> Tensor:
        """The indices of a step's items, of all ranks."""
        return self._of(epoch)[step * batch_size : (step + 1) * batch_size]

    def _drawn(self, epoch: int) -> Tensor:
        drawn = []
        for label, items in self.classes.items():
            rounds = math.ceil(self.share / len(items))
            draws = torch.rand(rounds, len(items), generator=generator(self.seed, epoch, "balanced", label))
            drawn.append(items[draws.argsort(stable=True, dim=1).flatten()[: self.share]])
        return torch.cat(drawn)[torch.randperm(len(self), generator=generator(self.seed, epoch, "order"))]


ON_HOST = ("index", "counted")  # of a batch: the numbers of its samples, and how many items of each the loss counts


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    return {name: x if name in ON_HOST else onto(x, device) for name, x in batch.items()}


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return [batch]
    nodes = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [tensor for node in nodes for tensor in tensors_of(node)]


def split_batch(batch: B, parts: int) -> list[B]:
    """A batch cut along the first dimension into at most `parts` parts; what is no tensor goes into each of them."""
    if parts == 1:
        return [batch]
    count = len(tensors_of(batch)[0])
    size = math.ceil(count / parts)

    def cut(node: Any, start: int) -> Any:
        if isinstance(node, Tensor):
            return node[start : start + size]
        if isinstance(node, Mapping):
            return {key: cut(value, start) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(cut(value, start) for value in node)
        return node

    return [cut(batch, start) for start in range(0, count, size)]
