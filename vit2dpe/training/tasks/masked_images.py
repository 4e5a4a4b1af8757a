"""Masked pretraining: predict hidden patches. Masks are drawn by key, like every other draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...data.transfer import onto
from ...modes import evaluating
from ...seeding import generator
from ...spec import Plain
from ..distributed import sum_over_ranks
from ..task import Batch, Task
from .classification import ImageTask, evaluation_batches


@dataclass
class MaskedTask(Task[Batch]):
    """Reconstruction of hidden patches, for a `MAE` or a `SimMIM`.

    Args:
        images: batches, augmentation and test images; their labels are not used.
        grid: patches of an image along its axes.
        mask_ratio: share of patches that is hidden.
    """

    images: ImageTask
    grid: tuple[int, ...]
    mask_ratio: float = 0.75
    unit: str = "images"
    best: tuple[str, str] | None = field(init=False)
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.best = f"{next(iter(self.images.data.held_out))}_loss", "min"
        self.steps_per_epoch = self.images.steps_per_epoch

    def batch(self, epoch: int, step: int) -> Batch:
        task = self.images
        batch = task.batch(epoch, step)
        size = min(task.batch_size, len(task.data.train) - step * task.batch_size)
        noise = torch.rand(size, math.prod(self.grid), generator=generator(task.seed, epoch, step, "mask"))
        return dict(
            images=batch["images"], noise=onto(noise[task.world.share(size)], task.device), index=batch["index"]
        )

    def close(self) -> None:
        self.images.close()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return model(batch["images"], self.mask_ratio, batch["noise"])[0], {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The loss on held-out images, behind the same masks every time."""
        with evaluating(model):
            return {f"{split}_loss": self._loss(model, split) for split in self.images.data.held_out}

    def _loss(self, model: nn.Module, split: str) -> float:
        task = self.images
        device, count = next(model.parameters()).device, len(task.data.held_out[split])
        noise = torch.rand(count, math.prod(self.grid), generator=generator(task.seed, f"{split} mask"))
        noise = noise[task.world.share(count)]
        losses, counts = list[Tensor](), list[int]()
        where = (task.world, split, task.workers, device)
        batches = evaluation_batches(task.data, task.train_size, 256, *where)
        for images, _ in batches:
            draw = noise[sum(counts) :][: len(images)]
            # Collectives need every rank in each forward pass, one without images left too.
            loss = model(images, self.mask_ratio, onto(draw, device))[0]
            if len(images):
                losses.append(loss.float())
                counts.append(len(images))
        read = torch.stack(losses).tolist() if losses else []
        total = sum((loss * count for loss, count in zip(read, counts, strict=True)), 0.0)
        total, n = sum_over_ranks([total, sum(counts)], task.world)
        return total / n

    def describe(self) -> dict[str, Plain]:
        return self.images.describe() | dict(task="masked pretraining", mask_ratio=self.mask_ratio)
