"""What every task for a `Seq2Seq` shares: batches of pairs, the loss of a batch, and the loss over many.

Legend: B pairs, S and N tokens of the longest source and target among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...data.pairs import Pair
from ...data.text import IGNORE
from ...data.transfer import sums
from ...models.text.model import pad
from ...modes import evaluating
from ..distributed import World, sum_over_ranks
from ..task import Batch, Task, to_device
from .language import count_labels, token_loss, with_count


def decoding_batch(pairs: Sequence[Pair], start: int, padding: int) -> Batch:
    """source (B, S) with source_valid; tokens (B, N), what the decoder reads, and labels, what it predicts.

    A decoder reads `start` and the target but its last token. Padding of a target comes last, where no token that
    counts attends to it, so it needs no mask.
    """
    source, source_valid = pad([a for a, _ in pairs], padding)
    tokens, _ = pad([torch.cat([b.new_full((1,), start), b[:-1]]) for _, b in pairs], padding)
    labels, _ = pad([b for _, b in pairs], IGNORE)
    return dict(source=source, source_valid=source_valid, tokens=tokens, labels=labels)


def decoding_loss(model: nn.Module, batch: Batch, reduction: str = "mean", smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats over the target's tokens."""
    logits = model(batch["source"], batch["tokens"], batch["source_valid"])
    return token_loss(logits, batch["labels"], reduction, smoothing)


class DecodingTask(Task[Batch]):
    """Loss and count of a task whose batches are those of `decoding_batch`."""

    smoothing: float = 0.0

    def count(self, batch: Batch) -> int:
        return count_labels(batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return decoding_loss(model, batch, smoothing=self.smoothing), {}


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    pairs: Sequence[Pair],
    start: int,
    padding: int,
    batch_size: int,
    world: World,
    device: torch.device | str,
) -> dict[str, float]:
    """val_loss in nats a token of the target and val_perplexity, in evaluation mode, the same on every rank."""
    own = pairs[world.share(len(pairs))]
    # Every rank has as many batches as the others: sharded models meet in each forward pass.
    batches = math.ceil(math.ceil(len(pairs) / world.size) / batch_size)
    losses, n = list[tuple[Tensor]](), 0
    with evaluating(model):
        for i in range(batches):
            share = own[World(i, batches).share(len(own))]
            batch = to_device(with_count(decoding_batch(share or pairs[:1], start, padding)), device)
            loss = decoding_loss(model, batch, reduction="sum")
            if share:
                losses.append((loss,))
                n += count_labels(batch)
    total, tokens = sum_over_ranks([*sums(losses, 1), n], world)
    return dict(val_loss=total / tokens, val_perplexity=math.exp(min(total / tokens, 700.0)))
