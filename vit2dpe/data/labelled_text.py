"""Reads a file of labelled lines, label<TAB>text, for text classification."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .text import decode_utf8
from .text_settings import TextDataConfig
from .tokenizers import Tokenizer, make_tokenizer


class Lines(NamedTuple):
    """Texts as token ids, (N,) each, with the index of their class."""

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
        tokenizer: of the model that is started from; default: that of the settings.

    Raises:
        DataError: if the file is missing, a line has no tab or no text, or there are fewer than two labels.
    """
    if config.path is None:
        raise ConfigError("to classify, name a file of lines label<TAB>text: --data.path file.tsv")
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}: give another --data.path")
    raw = path.read_bytes()
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(decode_utf8(raw, path).removesuffix("\n").split("\n"), start=1):
        label, tab, text = line.partition("\t")
        if not (label and tab and text):
            raise DataError(f"{path}, line {number}: a label, a tab and a text are needed, got {line[:40]!r}")
        texts.setdefault(label, []).append(text)
    classes = sorted(texts)
    cuts = {label: round(len(texts[label]) * (1 - config.val_share)) for label in classes}
    few = [label for label in classes if not 0 < cuts[label] < len(texts[label])]
    if len(classes) < 2 or few:
        raise DataError(
            f"{path}: two labels are needed, with lines for training and validation; too few: {few or classes}"
        )
    if tokenizer is None:
        ends = dict.fromkeys(classes) if config.tokenizer == "chars" else cuts
        learned_from = [text for label in classes for text in texts[label][: ends[label]]]
        tokenizer = make_tokenizer(config.tokenizer, learned_from, config.vocab)
    train: list[tuple[Tensor, int]] = []
    val: list[tuple[Tensor, int]] = []
    for index, label in enumerate(classes):
        rows = [(torch.tensor(tokenizer.encode(text)[: config.context]), index) for text in texts[label]]
        train += rows[: cuts[label]]
        val += rows[cuts[label] :]
    return Lines(path.stem, classes, train, val, tokenizer, hashlib.sha256(raw).hexdigest())
