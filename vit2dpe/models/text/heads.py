"""Text models with any encoding.

    TextEncoder   every token sees every token        BERT, arXiv 1810.04805
    TextDecoder   a token sees those before it        GPT-2; Llama, arXiv 2302.13971; BLOOM, arXiv 2211.05100
    Seq2Seq       a decoder that reads an encoder     `seq2seq.py`

Legend: B batch, N tokens, D width, V vocabulary. `valid` is boolean (B, N), False for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.prepare import Prediction, ranked
from ...data.tokenizers import from_json
from ...encodings import Position
from ...errors import ConfigError, DataError, unknown
from ...modes import evaluating
from ..arguments import check_arguments
from ..parts import norm_factory
from .model import Encoded, SequenceOptions, TextModel, pad

POOLS = ("cls", "mean", "max", "")


class TextEncoder(TextModel):
    """A bidirectional encoder with a head by choice.

    Args:
        pool: how a sequence becomes one vector: "cls" (its first token), "mean" or "max" over tokens that are not
            padding, or "" (every token by itself).
        num_classes: classes of a linear head on the pooled vector, or on each token with pool="" (0: no head).
        masked_lm: a head that predicts the hidden token (BERT's: linear, GELU, norm, the embedding's own matrix).
        **model: see `TextModel`.
    """

    def __init__(
        self,
        position: Position = "rope",
        *,
        pool: str = "mean",
        num_classes: int = 0,
        masked_lm: bool = False,
        **model: Any,
    ) -> None:
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
        if masked_lm and (pool or num_classes):
            raise ConfigError(f"masked_lm speaks of every token: it goes with pool='' and no classes, got {pool!r}")
        check_arguments({"num_classes": num_classes})
        super().__init__(position, **model)
        self.pool_name, self.num_classes = pool, num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        norm = norm_factory(model.get("norm", "layer"), model.get("norm_eps", 1e-5))
        self.masked_head = MaskedHead(self.embed_dim, self.vocab_size, norm) if masked_lm else None
        self.init_weights()

    def forward(self, tokens: Tensor, valid: Tensor | None = None, **more: Unpack[SequenceOptions]) -> Tensor:
        """(B, N) -> (B, D) or (B, classes); (B, N, D | classes | V) with pool=""."""
        if self.pool_name and more.get("segments") is not None:
            raise ConfigError("a packed batch has many documents in a row: take forward_features, or pool=''")
        x = self.forward_features(tokens, valid, **more)
        out: Tensor = (
            self.head(self.pool(x, valid)) if self.masked_head is None else self.masked_head(x, self.embed.weight)
        )
        return out

    def predict(self, texts: str | Sequence[str], k: int = 5, *, batch_size: int = 64) -> Prediction | list[Prediction]:
        """The k likeliest classes of a text, by name, and their probabilities; of several texts a list of them.

        A text is cut after `context` tokens, as in training. The mode of the model is left alone.

        Raises:
            ConfigError: for a model that was not trained to classify: it has no classes and no tokenizer.
            DataError: for a text that is empty, or has a character that the tokenizer does not know.
        """
        about = vars(self).get("about") or {}
        if not (self.num_classes and self.pool_name and {"classes", "tokenizer"} <= about.keys()):
            raise ConfigError(
                "predict is for a run of vit2dpe text train --objective classify: load_run(folder).predict(text)"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        tokenizer, device = from_json(about["tokenizer"]), self.embed.weight.device
        several, found = [texts] if isinstance(texts, str) else list(texts), list[Prediction]()
        lines = [torch.tensor(tokenizer.encode(text)[: self.context]) for text in several]
        if empty := [i for i, line in enumerate(lines) if not len(line)]:
            raise DataError(f"text {empty[0] + 1} of {len(lines)} is empty: there is nothing to classify")
        with evaluating(self), torch.inference_mode():
            for start in range(0, len(lines), batch_size):
                tokens, valid = pad(lines[start : start + batch_size])
                found += ranked(self(tokens.to(device), valid.to(device)).float(), about["classes"], k)
        return found[0] if isinstance(texts, str) else found

    def pool(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, D); padding never counts."""
        if self.pool_name == "":
            return x
        if self.pool_name == "cls":
            return x[:, 0] if valid is None else x[torch.arange(x.shape[0], device=x.device), valid.int().argmax(dim=1)]
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
        if self.pool_name == "max":
            return x.masked_fill(~keep[..., None], float("-inf")).amax(dim=1)
        return x.masked_fill(~keep[..., None], 0.0).sum(dim=1) / keep.sum(dim=1, keepdim=True).clamp(min=1)

    def encode(self, tokens: Tensor, valid: Tensor | None = None) -> Encoded:
        """The output that a decoder reads."""
        return Encoded(self.forward_features(tokens, valid), self.positions(tokens, valid), valid)


class MaskedHead(nn.Module):
    """BERT's: logits = norm(gelu(W x + b)) Eᵀ + c, with the embedding E."""

    def __init__(self, dim: int, vocab_size: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = norm(dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), embedding, self.bias)


class TextDecoder(TextModel):
    """A causal decoder with a head over the vocabulary.

    Args:
        tied: whether the head is the embedding's own matrix.
        logit_scale: factor before the head (T5 with a tied head: 1/√D).
        **model: see `TextModel`.
    """

    causal = True

    def __init__(
        self,
        position: Position = "rope",
        *,
        tied: bool = True,
        logit_scale: float = 1.0,
        **model: Any,
    ) -> None:
        super().__init__(position, **model)
        self.logit_scale = logit_scale
        self.head = None if tied else nn.Linear(self.embed_dim, self.vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens: Tensor, valid: Tensor | None = None, **more: Unpack[SequenceOptions]) -> Tensor:
        """(B, N) -> (B, N, V): logits of the token after each."""
        return self.forward_head(self.forward_features(tokens, valid, **more))

    def forward_head(self, x: Tensor) -> Tensor:
        x = x if self.logit_scale == 1.0 else x * self.logit_scale
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)
