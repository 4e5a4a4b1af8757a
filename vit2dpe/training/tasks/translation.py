"""Translation: pairs of sentences, batches of them for a `Seq2Seq`, what it writes, and BLEU of that.

One vocabulary serves both languages (subwords learned from both sides of the training pairs), so that embeddings can be
shared as in Vaswani et al., arXiv 1706.03762. A sentence ends with </s>, on both sides; the decoder starts from <s>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.pairs import Encoder, Pairs
from ...errors import ConfigError
from ..distributed import ALONE, World
from ..task import Batch, Task, batch_indices, count_steps, describe_data
from .seq2seq import count_labels, decoding_batch, decoding_loss, evaluate_pairs


@dataclass(frozen=True)
class TranslationTask(Task[Batch]):
    """Each training pair once an epoch, in an order drawn anew; validation loss without smoothing.

    Args:
        data: pairs.
        batch_size: pairs of a step, over all ranks.
        smoothing: label smoothing of the training loss.
        seed, device, world: as in `ImageTask`.
    """

    data: Pairs
    batch_size: int
    smoothing: float = 0.0
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    best: tuple[str, str] | None = ("val_loss", "min")
    unit: str = "tokens"

    @property
    def steps_per_epoch(self) -> int:  # type: ignore[override]
        return count_steps(len(self.data.train), self.batch_size, self.world)

    def batch(self, epoch: int, step: int) -> Batch:
        train = self.data.train
        index = batch_indices(len(train), self.batch_size, self.seed, epoch, step)
        index = index[self.world.share(len(index))]
        encode = Encoder(self.data.tokenizer)
        found = decoding_batch([train[i] for i in index.tolist()], encode.start, encode.pad)
        return {name: value.to(self.device, non_blocking=True) for name, value in found.items()} | {"index": index}

    def count(self, batch: Batch) -> int:
        return count_labels(batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return decoding_loss(model, batch, smoothing=self.smoothing), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        encode, pairs = Encoder(self.data.tokenizer), sorted(self.data.val, key=lambda pair: len(pair[0]))
        return evaluate_pairs(model, pairs, encode.start, encode.pad, self.batch_size, self.world, self.device)

    def describe(self) -> dict[str, Any]:
        return describe_data("translation", self.data, tokenizer=self.data.tokenizer.describe())


class Score(NamedTuple):
    """BLEU in percent, and how sacrebleu computed it."""

    bleu: float
    signature: str


def bleu(written: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu defines it (arXiv 1804.08771): cased, tokenizer 13a."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise ConfigError('BLEU needs an extra that is not installed: pip install "vit2dpe[text]"') from None
    metric = BLEU()
    return Score(metric.corpus_score(list(written), [list(references)]).score, str(metric.get_signature()))
