"""Classification of labelled lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.labelled_text import Lines
from ...models.text.model import pad
from ...modes import evaluating
from ..distributed import ALONE, World, sum_over_ranks
from ..task import Batch, Task, batch_indices, count_steps, describe_data


@dataclass(frozen=True)
class LineTask(Task[Batch]):
    """Each training line once an epoch, in an order drawn anew.

    Args:
        data: lines.
        batch_size: lines of a step, over all ranks.
        smoothing: label smoothing of the training loss.
        seed, device, world: as in `ImageTask`.
    """

    data: Lines
    batch_size: int
    smoothing: float = 0.0
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    best: tuple[str, str] | None = ("val_top1", "max")
    unit: str = "lines"

    @property
    def steps_per_epoch(self) -> int:  # type: ignore[override]
        return count_steps(len(self.data.train), self.batch_size, self.world)

    def batch(self, epoch: int, step: int) -> Batch:
        train = self.data.train
        index = batch_indices(len(train), self.batch_size, self.seed, epoch, step)
        index = index[self.world.share(len(index))]
        return self._batch([train[i] for i in index.tolist()]) | {"index": index}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        logits = model(batch["tokens"], batch["valid"])
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.smoothing), {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        lines = sorted(self.data.val, key=lambda line: len(line[0]))
        cuts = [slice(i, i + self.batch_size) for i in range(0, len(lines), self.batch_size)]
        right, loss = 0.0, 0.0
        with evaluating(model):
            for cut in cuts:
                part = lines[cut][self.world.share(len(lines[cut]))]
                batch = self._batch(part or lines[:1])  # sharded models meet in each forward pass
                logits = model(batch["tokens"], batch["valid"]).float()
                if part:
                    right += float((logits.argmax(-1) == batch["labels"]).sum())
                    loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
        right, loss = sum_over_ranks([right, loss], self.world, torch.device(self.device))
        return dict(val_top1=100 * right / len(lines), val_loss=loss / len(lines))

    def describe(self) -> dict[str, Any]:
        tokenizer = self.data.tokenizer.describe()
        return describe_data("text classification", self.data, classes=self.data.classes, tokenizer=tokenizer)

    def _batch(self, lines: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        tokens, valid = pad([ids for ids, _ in lines])
        labels = torch.tensor([label for _, label in lines])
        return {n: t.to(self.device) for n, t in dict(tokens=tokens, valid=valid, labels=labels).items()}
