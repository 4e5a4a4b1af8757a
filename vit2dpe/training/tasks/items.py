"""What tasks share: seed, device and world; and each item once an epoch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from ..distributed import ALONE, World
from ..task import Batch, Task, batch_indices, count_steps, to_device

Item = TypeVar("Item")


class Items(Protocol[Item]):
    """Data in a list of items."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def train(self) -> list[Item]: ...


@dataclass
class SeededTask(Task[Batch]):
    """A task whose draws are keyed.

    Args:
        seed: of order, augmentation and every other draw.
        device: where batches go.
        world: this process among how many.
    """

    _: KW_ONLY
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE


@dataclass
class ItemTask(SeededTask, Generic[Item]):
    """Each training item once an epoch, in an order drawn anew.

    Args:
        data: items.
        batch_size: items of a step, over all ranks.
        smoothing: label smoothing of the training loss.
        drop_last: leave out a last batch that is smaller (`task.count_steps`).
    """

    data: Items[Item]
    batch_size: int
    smoothing: float = 0.0
    drop_last: bool | None = False
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = count_steps(len(self.data.train), self.batch_size, self.world, self.drop_last)

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> Batch:
        """Items as tensors, on the CPU."""

    def batch(self, epoch: int, step: int) -> Batch:
        train = self.data.train
        index = batch_indices(len(train), self.batch_size, self.seed, epoch, step)
        index = index[self.world.share(len(index))]
        return to_device(self.collate([train[i] for i in index.tolist()]), self.device) | {"index": index}
