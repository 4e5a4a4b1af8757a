"""Settings of text data."""

from __future__ import annotations

from dataclasses import dataclass

from ..ranges import Count, Part
from ..spec import Settings


@dataclass(frozen=True)
class TextDataConfig(Settings):
    """Text: where it lies, how it is tokenized and split.

    Args:
        path: a file of plain text, UTF-8; default: `url`, downloaded once. To classify: lines of a label, a tab and a
            text.
        url: where the file comes from if no path is given.
        sha256: of the downloaded file; another one is refused.
        pairs: to translate: a folder of train, val and a test set in two languages, train.de, train.en, ... or .gz.
        source: the source language.
        target: the target language.
        test: the set that is translated in the end.
        tokenizer: chars, bytes, bpe, wordpiece (learned from the training text), or the path of a tokenizer.json.
        vocab: how many tokens bpe and wordpiece learn.
        val_share: part of the text, at its end, that is kept for validation; of labelled lines, of each label's.
        context: tokens of a training sequence; longer pairs are left out, longer lines are cut.
        limit: read only so many characters, or pairs of each set.
    """

    path: str | None = None
    url: str | None = None
    sha256: str | None = None
    pairs: str | None = None
    source: str = "de"
    target: str = "en"
    test: str = "test_2016_flickr"
    tokenizer: str = "chars"
    vocab: Count = 8000
    val_share: Part = 0.1
    context: Count = 256
    limit: Count | None = None
