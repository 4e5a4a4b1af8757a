"""Classes of short texts: lines of a label, a tab and a text, and a `TextEncoder` that tells the label."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .text_settings import TextDataConfig
from .tokenizers import Tokenizer, make_tokenizer


class Lines(NamedTuple):
    """Texts as token ids, (N,) each, with the number of their class."""

    name: str
    classes: list[str]
    train: list[tuple[Tensor, int]]
    val: list[tuple[Tensor, int]]
    tokenizer: Tokenizer
    digest: str


def load_lines(config: TextDataConfig, tokenizer: Tokenizer | None = None) -> Lines:
    """Read a file of labelled lines. The last `val_share` of each label's lines are for validation.

    Args:
        config: `path`; texts are cut after `context` tokens.
        tokenizer: of the model that is started from; default: the one that the settings name.

    Raises:
        DataError: if the file is missing, a line has no tab or no text, or there are fewer than two labels.
    """
    if config.path is None:
        raise ConfigError("to classify, name a file of lines label<TAB>text: --data.path file.tsv")
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}: give another --data.path")
    raw = path.read_bytes()
    try:
        whole = raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): convert it") from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(whole.removesuffix("\n").split("\n"), start=1):
        label, tab, text = line.partition("\t")
        if not (label and tab and text):
            raise DataError(f"{path}, line {number}: a label, a tab and a text are needed, got {line[:40]!r}")
        found.setdefault(label, []).append(text)
    classes = sorted(found)
    cuts = {label: round(len(texts) * (1 - config.val_share)) for label, texts in found.items()}
    few = [label for label in classes if not 0 < cuts[label] < len(found[label])]
    if len(classes) < 2 or few:
        raise DataError(
            f"{path}: two labels are needed, with lines for training and validation; too few: {few or classes}"
        )
    if tokenizer is None:
        texts = [
            text for label in classes for text in found[label][: None if config.tokenizer == "chars" else cuts[label]]
        ]
        tokenizer = make_tokenizer(config.tokenizer, texts, config.vocab)

    def encoded(part: dict[str, list[str]]) -> list[tuple[Tensor, int]]:
        rows = [(tokenizer.encode(text), i) for i, label in enumerate(classes) for text in part[label]]
        return [(torch.tensor(ids[: config.context]), label) for ids, label in rows]

    train = encoded({label: found[label][: cuts[label]] for label in classes})
    val = encoded({label: found[label][cuts[label] :] for label in classes})
    return Lines(path.stem, classes, train, val, tokenizer, hashlib.sha256(raw).hexdigest())
