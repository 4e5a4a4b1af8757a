"""Small tasks on sequences whose answer depends on order: copy, reverse, sort. Nothing is read; every draw has a key.

    copy       y_i = x_i             needs no positions
    reverse    y_i = x_(n-1-i)       cannot be done without them
    sort       y = x in rising order; an output depends on its index and on all inputs

The answers are read off an encoder, a class for each token. Source of the setting: UvA deep learning course, tutorial 6
(reverse: 16 numbers below 10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...data.transfer import read
from ...modes import evaluating
from ...seeding import generator
from ...spec import Plain
from ..task import Batch, to_device
from .items import SeededTask
from .language import token_loss

SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "sort": lambda x: x.sort(dim=1).values,
}


@dataclass
class SequenceTask(SeededTask):
    """Batches of random numbers below `symbols` and their answers.

    Args:
        name: a name in `SEQUENCES`.
        length: numbers of a sequence.
        batch_size: sequences of a step, over all ranks.
        steps_per_epoch: updates between two evaluations.
        symbols: how many kinds of numbers.
    """

    name: str
    length: int
    batch_size: int
    steps_per_epoch: int
    symbols: int = 10
    best: tuple[str, str] | None = ("val_exact", "max")
    unit: str = "sequences"

    def batch(self, epoch: int, step: int) -> Batch:
        draws = generator(self.seed, epoch, step, self.name)
        tokens = torch.randint(self.symbols, (self.batch_size, self.length), generator=draws)
        tokens = tokens[self.world.share(self.batch_size)]
        return to_device(dict(tokens=tokens, labels=SEQUENCES[self.name](tokens)), self.device)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return token_loss(model(batch["tokens"]), batch["labels"]), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        score = answers(model, self.name, self.length, self.symbols, device=self.device)
        return dict(val_exact=score["exact"], val_loss=score["loss"])

    def describe(self) -> dict[str, Plain]:
        return dict(task=self.name, data=self.name, digest=f"{self.name}-{self.length}-{self.symbols}")


@torch.no_grad()
def answers(
    model: nn.Module,
    name: str,
    length: int,
    symbols: int = 10,
    *,
    n: int = 1000,
    device: torch.device | str = "cpu",
    whole: list[Tensor] | None = None,
) -> dict[str, float]:
    """{"exact": sequences right, "top1": tokens right, both in percent, "loss": nats, "n": sequences}, on sequences of
    their own key. `whole`: a list that gains (n,) booleans on the CPU, whether a sequence is right."""
    tokens = torch.randint(symbols, (n, length), generator=generator("test", name, length))
    labels = SEQUENCES[name](tokens).to(device)
    with evaluating(model):
        logits = model(tokens.to(device))
    right = logits.argmax(-1) == labels
    if whole is not None:
        whole.append(right.all(1).cpu())
    ((exact, top1, loss),) = read([(right.all(1).float().mean(), right.float().mean(), token_loss(logits, labels))])
    return dict(exact=100 * exact, top1=100 * top1, loss=loss, n=n)
