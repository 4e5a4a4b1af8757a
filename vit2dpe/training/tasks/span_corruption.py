"""T5's span corruption, arXiv 1910.10683, section 3.1.4: spans of a text are taken out, and a `Seq2Seq` predicts them.

    tokens   a b c d e f g h i j        spans  c d,  h
    source   a b X₀ e f g X₁ i j </s>
    target   X₀ c d X₁ h </s>

Of n tokens m = round(n · rate) are hidden, in round(m / mean) spans whose lengths are a random composition of m; those
of what stays are one of n - m, and a text starts with what stays. Sentinel i is the id V - 1 - i, as T5's <extra_id_i>.
Source of the numbers: `random_spans_noise_mask` of the T5 code; the figure of the paper has one more sentinel at the
end of the target, the code has none, nor has ours. Special tokens of a text are never hidden: the numbers are those of
the text without them, and one within a span parts it in two (T5's texts have none).

Legend: B texts, n tokens of one, V vocabulary with sentinels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...seeding import generator
from ...spec import Plain
from ..task import Batch, describe_data, to_device
from .language import TextTask, ordinary_tokens, with_count
from .seq2seq import DecodingTask, decoding_batch, evaluate_pairs


@dataclass(frozen=True)
class SpanCorruption:
    """A collator: texts of token ids to a batch for a `Seq2Seq`.

    Args:
        vocab_size: V; the last `sentinels` ids of it are the sentinels.
        stop: ends source and target.
        start: what the decoder begins with, and padding (T5: 0 for both).
        sentinels: how many there are; more spans than this are refused.
        rate: share of tokens that is hidden.
        mean: tokens of a span on average.
        special: ids that are never hidden.
    """

    vocab_size: int
    stop: int
    start: int = 0
    sentinels: int = 100
    rate: float = 0.15
    mean: float = 3.0
    special: tuple[int, ...] = ()

    def __call__(self, texts: Sequence[Tensor], draws: torch.Generator | None = None) -> dict[str, Tensor]:
        """source (B, S) with source_valid; tokens (B, N), what the decoder reads, and labels, what it predicts."""
        return decoding_batch([self.pair(text, self.hidden_in(text, draws)) for text in texts], self.start, self.start)

    def hidden_in(self, text: Tensor, draws: torch.Generator | None = None) -> Tensor:
        """(n,) boolean: what is taken out of a text of token ids (n,), special ones left in."""
        ordinary = ordinary_tokens(text, self.special)
        if bool(ordinary.all()):
            return self.hidden(len(text), draws)
        hidden = torch.zeros_like(ordinary)
        if int(ordinary.sum()) > 1:
            hidden[ordinary] = self.hidden(int(ordinary.sum()), draws)
        return hidden & (_first(hidden).cumsum(0) <= self.sentinels)  # spans that were parted may be too many

    def hidden(self, n: int, draws: torch.Generator | None = None) -> Tensor:
        """(n,) boolean: what is taken out of n tokens of which none is special."""
        if n < 2:
            raise ConfigError(f"a text needs two tokens to hide one of them, got {n}")
        m = min(max(round(n * self.rate), 1), n - 1)
        spans = min(max(round(m / self.mean), 1), m, n - m)
        if spans > self.sentinels:
            raise ConfigError(f"{n} tokens have {spans} spans, and there are {self.sentinels} sentinels")
        lengths = torch.stack([_composition(n - m, spans, draws), _composition(m, spans, draws)], dim=1).flatten()
        return (torch.arange(2 * spans) % 2 == 1).repeat_interleave(lengths)

    def pair(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Source and target of one text (n,); `hidden` (n,) marks what is taken out."""
        first = _first(hidden)
        sentinel = self.vocab_size - first.cumsum(0)  # of the span that a hidden token is in
        source = torch.where(first, sentinel, tokens)[~hidden | first]
        twice = torch.stack([sentinel, tokens], dim=1)  # each hidden token, and its sentinel before the first
        target = twice[torch.stack([first, hidden], dim=1)]
        end = tokens.new_full((1,), self.stop)
        return torch.cat([source, end]), torch.cat([target, end])

    def restore(self, source: Tensor, target: Tensor) -> Tensor:
        """The text (n,) that a source and a target came from."""
        lowest = self.vocab_size - self.sentinels
        spans: dict[int, list[int]] = {}
        inside: list[int] = []
        for token in target[:-1].tolist():
            if token >= lowest:
                inside = spans.setdefault(token, [])
            else:
                inside.append(token)
        ids = [id_ for token in source[:-1].tolist() for id_ in (spans[token] if token >= lowest else [token])]
        return torch.tensor(ids, dtype=source.dtype)


def _first(hidden: Tensor) -> Tensor:
    """Where spans begin."""
    return hidden & ~torch.cat([hidden.new_zeros(1), hidden[:-1]])


def _composition(total: int, parts: int, draws: torch.Generator | None) -> Tensor:
    """(parts,) whole numbers of at least 1 that sum to `total`, all such rows equally likely."""
    cuts = torch.randperm(total - 1, generator=draws)[: parts - 1].sort().values + 1
    ends = torch.cat([cuts, torch.tensor([total])])
    return ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))


@dataclass
class SpanTask(DecodingTask, TextTask):
    """Span corruption; the spans of the validation text are the same at every evaluation.

    Args:
        collate: how texts are corrupted.
    """

    collate: SpanCorruption = field(kw_only=True)

    def batch(self, epoch: int, step: int) -> Batch:
        text, draws = self.data.train, generator(self.seed, epoch, step, "spans")
        start = torch.randint(len(text) - self.context + 1, (self.batch_size,), generator=draws).tolist()
        texts = [text[i : i + self.context] for i in start]
        hidden = [self.collate.hidden_in(text, draws) for text in texts]
        own = list(zip(texts, hidden, strict=True))[self.world.share(self.batch_size)]
        pairs = [self.collate.pair(text, h) for text, h in own]
        return to_device(with_count(decoding_batch(pairs, self.collate.start, self.collate.start)), self.device)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        text, n, start = self.data.val, self.context, self.collate.start
        draws = generator("validation", n, len(text))
        texts = [text[i : i + n] for i in range(0, len(text) - n + 1, n)]
        pairs = [self.collate.pair(text, self.collate.hidden_in(text, draws)) for text in texts]
        return evaluate_pairs(model, pairs, start, start, self.batch_size, self.world, self.device)

    def describe(self) -> dict[str, Plain]:
        tokenizer = self.data.tokenizer.describe()
        return describe_data("span corruption", self.data, context=self.context, tokenizer=tokenizer)
