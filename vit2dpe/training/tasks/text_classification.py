"""Classification of labelled lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.labelled_text import Lines
from ...data.transfer import sums
from ...models.text.model import pad
from ...modes import evaluating
from ...spec import Plain
from ..distributed import sum_over_ranks
from ..task import Batch, describe_data, to_device
from .items import ItemTask

Line = tuple[Tensor, int]


@dataclass
class LineTask(ItemTask[Line]):
    """Classes of lines: an `ItemTask` of a line's token ids (N,) and the number of its class."""

    data: Lines
    best: tuple[str, str] | None = ("val_top1", "max")
    unit: str = "lines"

    def collate(self, items: Sequence[Line]) -> Batch:
        """tokens (B, N), valid (B, N) and labels (B,)."""
        tokens, valid = pad([ids for ids, _ in items])
        return dict(tokens=tokens, valid=valid, labels=torch.tensor([label for _, label in items]))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        logits = model(batch["tokens"], batch["valid"])
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.smoothing), {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        lines = sorted(self.data.val, key=lambda line: len(line[0]))
        cuts = [slice(i, i + self.batch_size) for i in range(0, len(lines), self.batch_size)]
        found = list[tuple[Tensor, Tensor]]()  # right ones and loss of each batch
        with evaluating(model):
            for cut in cuts:
                own = lines[cut][self.world.share(len(lines[cut]))]
                # Sharded models meet in each forward pass.
                batch = to_device(self.collate(own or lines[:1]), self.device)
                logits = model(batch["tokens"], batch["valid"]).float()
                if own:
                    right = (logits.argmax(-1) == batch["labels"]).sum()
                    found.append((right, F.cross_entropy(logits, batch["labels"], reduction="sum")))
        hits, loss = sum_over_ranks(sums(found, 2), self.world)
        return dict(val_top1=100 * hits / len(lines), val_loss=loss / len(lines))

    def describe(self) -> dict[str, Plain]:
        tokenizer = self.data.tokenizer.describe()
        return describe_data("text classification", self.data, classes=self.data.classes, tokenizer=tokenizer)
