"""Causal and masked language modelling: batches, loss and evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.text import IGNORE, TextData
from ...data.tokenizers import Tokenizer
from ...data.transfer import onto
from ...errors import DataError
from ...modes import evaluating
from ...seeding import generator
from ...spec import Plain
from ..distributed import ALONE, World, sum_over_ranks
from ..task import Batch, describe_data, to_device
from .items import SeededTask


@dataclass
class TextTask(SeededTask):
    """A task on one long text: random sequences for training, all of the validation text to measure.

    Args:
        data: token ids.
        context: N, tokens of a sequence.
        batch_size: sequences of a step, over all ranks.
        steps_per_epoch: updates between two evaluations.
    """

    data: TextData
    context: int
    batch_size: int
    steps_per_epoch: int
    best: tuple[str, str] | None = ("val_loss", "min")
    unit: str = "tokens"


@dataclass
class LanguageTask(TextTask):
    """Language modelling.

    Args:
        mask: id of the mask token, for BERT's objective: predict the masked tokens; None: predict the next token.
    """

    mask: int | None = field(default=None, kw_only=True)

    def batch(self, epoch: int, step: int) -> Batch:
        text, length, tokenizer = self.data.train, self.context + (self.mask is None), self.data.tokenizer
        draws = generator(self.seed, epoch, step, "text")
        start = torch.randint(len(text) - length + 1, (self.batch_size,), generator=draws)
        share = self.world.share(self.batch_size)
        tokens = text[start[share, None] + torch.arange(length)]
        if self.mask is None:
            tokens, labels = tokens[:, :-1], without_padding(tokens[:, 1:], tokenizer)
        else:
            hidden = torch.rand(self.batch_size, length, 2, generator=draws)[share]
            other = random_tokens(tokenizer.size, (self.batch_size, length), draws, tokenizer.special)[share]
            tokens, labels = mask_tokens(tokens, self.mask, hidden, other, special=tokenizer.special)
        return to_device(with_count(dict(tokens=tokens, labels=labels, index=start[share])), self.device)

    def count(self, batch: Batch) -> int:
        return count_labels(batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return token_loss(model(batch["tokens"]), batch["labels"]), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        batches = windows(self.data.val, self.context, self.world, mask=self.mask, tokenizer=self.data.tokenizer)
        loss, n = evaluate_text(model, batches, self.device)
        if self.world.size > 1:
            total, count = sum_over_ranks([loss * n, n], self.world)
            loss = total / count
        return dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700.0)))

    def describe(self) -> dict[str, Plain]:
        task, tokenizer = "language" if self.mask is None else "masked language", self.data.tokenizer.describe()
        return describe_data(task, self.data, context=self.context, tokenizer=tokenizer)


def with_count(batch: Batch) -> Batch:
    """The batch with (B,) `counted`, labels that are predicted: counted on the host, before they go to a device."""
    return batch | {"counted": (batch["labels"] != IGNORE).sum(1)}


def count_labels(batch: Batch) -> int:
    """Labels that are predicted."""
    return int((batch["counted"] if "counted" in batch else batch["labels"] != IGNORE).sum())


def windows(
    text: Tensor,
    length: int,
    world: World = ALONE,
    *,
    mask: int | None = None,
    tokenizer: Tokenizer | None = None,
    tokens_a_batch: int = 16_384,
) -> Iterator[dict[str, Tensor]]:
    """All whole sequences of a text one after the other, without overlap, in batches; each token predicted once.

    A remainder shorter than a sequence is left out. With `mask`, the same tokens are masked at every call. Special
    tokens of the `tokenizer` are never masked, and its padding is never predicted.
    """
    count = (len(text) - 1) // length
    tokens, labels = text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length)
    if mask is None:
        labels = without_padding(labels, tokenizer)
    else:
        special = () if tokenizer is None else tokenizer.special
        draws = generator("validation", length, len(text))
        hidden = torch.rand(count, length, 2, generator=draws)
        other = random_tokens(int(text.max()) + 1, (count, length), draws, special)
        tokens, labels = mask_tokens(tokens, mask, hidden, other, special=special)
    own = world.share(count)
    # Every rank has as many batches as the others: sharded models meet in each forward pass.
    batches = math.ceil(math.ceil(count / world.size) * length / tokens_a_batch)
    for i in range(batches):
        share = World(i, batches).share(own.stop - own.start)
        cut = slice(own.start + share.start, own.start + share.stop)
        yield dict(tokens=tokens[cut], labels=labels[cut])


@torch.no_grad()
def evaluate_text(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], device: torch.device | str = "cpu", last: int | None = None
) -> tuple[float, int]:
    """(mean loss in nats a token, tokens) of a model in evaluation mode; `last`: of the last so many of a sequence."""
    losses, n = list[Tensor](), 0
    with evaluating(model):
        for batch in batches:
            labels, logits = batch["labels"], model(onto(batch["tokens"], device))
            if last is not None:
                logits, labels = logits[:, -last:], labels[:, -last:]
            n += int((labels != IGNORE).sum())
            losses.append(token_loss(logits, onto(labels, device), reduction="sum"))
    if n == 0:
        raise DataError("no tokens to evaluate: the text is shorter than one sequence")
    return sum(torch.stack(losses).tolist()) / n, n


def token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean", smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats over labels that are not IGNORE: logits (B, N, V), labels (B, N)."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction=reduction,
        label_smoothing=smoothing,
    )


def without_padding(labels: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Labels with IGNORE where they are padding."""
    if tokenizer is None or tokenizer.pad is None:
        return labels
    return labels.masked_fill(labels == tokenizer.pad, IGNORE)


def random_tokens(size: int, shape: tuple[int, ...], draws: torch.Generator, special: Sequence[int] = ()) -> Tensor:
    """Ids below `size` without the special ones, each as likely."""
    ordinary = ordinary_tokens(torch.arange(size), special).nonzero()[:, 0]
    return ordinary[torch.randint(max(len(ordinary), 1), shape, generator=draws)]


def ordinary_tokens(tokens: Tensor, special: Sequence[int]) -> Tensor:
    """Where tokens are none of the special ones: boolean, as `tokens`."""
    return torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype, device=tokens.device), invert=True)


def mask_tokens(
    tokens: Tensor, mask: int, draws: Tensor, other: Tensor, *, rate: float = 0.15, special: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """BERT's masking (arXiv 1810.04805): of the tokens chosen, 80% become `mask`, 10% another token, 10% stay.

    Args:
        tokens: (B, N).
        draws: (B, N, 2) uniform in [0, 1): whether a token is chosen, and what becomes of it.
        other: (B, N) random tokens, see `random_tokens`.
        rate: share that is chosen.
        special: ids that are never chosen.

    Returns:
        the masked tokens, and labels: the original token where one was chosen, IGNORE elsewhere.
    """
    chosen = (draws[..., 0] < rate) & ordinary_tokens(tokens, special)
    fate = draws[..., 1]
    masked = torch.where(chosen & (fate < 0.8), mask, tokens)
    masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, masked)
    return masked, torch.where(chosen, tokens, IGNORE)
