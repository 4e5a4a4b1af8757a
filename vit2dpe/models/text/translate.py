"""Translating lines with a trained `Seq2Seq`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...data.pairs import Encoder
from ...data.tokenizers import Subwords
from .generate import beam_search
from .model import pad
from .seq2seq import Seq2Seq


def translate(
    model: Seq2Seq, tokenizer: Subwords, texts: Sequence[str], *, beams: int = 4, batch: int = 64
) -> list[str]:
    """Translations of sentences by beam search (one beam: greedy), in their order.

    A translation has at most as many tokens as the decoder's context, independent of the batch.
    """
    encode, device = Encoder(tokenizer), next(model.parameters()).device
    sources = [encode(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(sources[i]))
    translations = [""] * len(texts)
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        source, valid = (t.to(device) for t in pad([sources[i] for i in chosen], encode.pad))
        start = torch.full((len(chosen), 1), encode.start, device=device)
        with torch.no_grad():
            memory = model.encode(source, valid)
        written = beam_search(model.decoder, start, model.decoder.context, stop=encode.stop, beams=beams, memory=memory)
        for i, row in zip(chosen, written[:, 1:].tolist(), strict=True):
            translations[i] = tokenizer.decode(row[: row.index(encode.stop)] if encode.stop in row else row).strip()
    return translations
