"""Translation: pairs of sentences, batches of them for a `Seq2Seq`, and BLEU of what it writes.

One vocabulary serves both languages (subwords learned from both sides of the training pairs), so that embeddings can be
shared as in Vaswani et al., arXiv 1706.03762. A sentence ends with </s>, on both sides; the decoder starts from <s>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ...data.pairs import Encoder, Pair, Pairs
from ...errors import ConfigError, install
from ...spec import Plain
from ..task import Batch, describe_data
from .items import ItemTask
from .language import with_count
from .seq2seq import DecodingTask, decoding_batch, evaluate_pairs


@dataclass
class TranslationTask(DecodingTask, ItemTask[Pair]):
    """Translation: an `ItemTask` of pairs of sentences; validation loss without smoothing."""

    data: Pairs
    best: tuple[str, str] | None = ("val_loss", "min")
    unit: str = "tokens"

    def collate(self, items: Sequence[Pair]) -> Batch:
        encode = Encoder(self.data.tokenizer)
        return with_count(decoding_batch(items, encode.start, encode.pad))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        encode, pairs = Encoder(self.data.tokenizer), sorted(self.data.val, key=lambda pair: len(pair[0]))
        return evaluate_pairs(model, pairs, encode.start, encode.pad, self.batch_size, self.world, self.device)

    def describe(self) -> dict[str, Plain]:
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
        raise ConfigError(f"BLEU needs an extra that is not installed: {install('text')}") from None
    metric = BLEU()
    return Score(metric.corpus_score(list(written), [list(references)]).score, str(metric.get_signature()))
