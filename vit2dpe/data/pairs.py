"""Reads pairs of files with a sentence a line, for translation."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, unknown
from .text import decode_utf8
from .text_settings import TextDataConfig
from .tokenizers import Description, Subwords, from_json, make_tokenizer

Pair = tuple[Tensor, Tensor]  # token ids of a source and of its target, each with its end


class Pairs(NamedTuple):
    """Sentences in two languages."""

    name: str
    train: list[Pair]
    val: list[Pair]
    test: list[tuple[str, str]]
    tokenizer: Subwords
    digest: str
    left_out: int  # training pairs longer than the context


def load_pairs(config: TextDataConfig) -> Pairs:
    """Read `<split>.<language>` or `<split>.<language>.gz`, a sentence a line, for train, val and the test set.

    Args:
        config: `pairs` names the folder, `source`, `target` and `test` the files; `limit` takes the first so many pairs
            of each split; `tokenizer` and `vocab` as for a text. Training pairs of more than `context` tokens on either
            side are left out.

    Raises:
        ConfigError: without a folder, or with a tokenizer that has no <pad>, <s> and </s>.
        DataError: if a file is missing or two sides have different numbers of lines.
    """
    if config.pairs is None:
        raise ConfigError("translation needs pairs: --data.pairs FOLDER with train, val and test in two languages")
    folder = Path(config.pairs).expanduser()
    sha = hashlib.sha256()
    splits: list[list[tuple[str, str]]] = []
    for split in ("train", "val", config.test):
        sides = []
        for language in (config.source, config.target):
            path, raw = _read(folder, f"{split}.{language}")
            sha.update(raw)
            sides.append(decode_utf8(raw, path).removesuffix("\n").split("\n"))
        if len(sides[0]) != len(sides[1]) or not sides[0]:
            raise DataError(
                f"{folder}: {split} has {len(sides[0])} lines of {config.source} and {len(sides[1])} of "
                f"{config.target}; both need the same number, at least one"
            )
        splits.append(list(zip(*sides, strict=True))[: config.limit])
    texts = [text for pair in splits[0] for text in pair]
    tokenizer = make_tokenizer(config.tokenizer, texts, config.vocab)
    if not isinstance(tokenizer, Subwords):
        raise ConfigError(
            "translation needs the tokens <pad>, <s> and </s>: --data.tokenizer bpe or wordpiece, got "
            f"{config.tokenizer}"
        )
    encode = Encoder(tokenizer)
    train, val = ([(encode(a), encode(b)) for a, b in split] for split in splits[:2])
    short = [pair for pair in train if max(map(len, pair)) <= config.context]
    if not short:
        raise DataError(f"none of {len(train)} training pairs fits into data.context = {config.context} tokens")
    name = f"{folder.name} {config.source}-{config.target}"
    return Pairs(name, short, val, splits[2], tokenizer, sha.hexdigest(), len(train) - len(short))


class Encoder:
    """A sentence as token ids with its end, (N,), under a tokenizer with <pad>, <s> and </s>."""

    def __init__(self, tokenizer: Subwords) -> None:
        self.tokenizer = tokenizer
        self.pad, self.start, self.stop = (tokenizer.id(token) for token in ("<pad>", "<s>", "</s>"))

    def __call__(self, text: str) -> Tensor:
        return torch.tensor([*self.tokenizer.encode(text), self.stop])


def load_pair_tokenizer(about: Mapping[str, Description]) -> Subwords:
    """The tokenizer in the metadata of a translation run."""
    tokenizer = from_json(about["tokenizer"])
    if not isinstance(tokenizer, Subwords):
        raise unknown("tokenizer of a translation", type(tokenizer).__name__, ["Subwords"])
    return tokenizer


def _read(folder: Path, name: str) -> tuple[Path, bytes]:
    """The path of a file or of its .gz, and its content."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path, gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    raise DataError(f"there is neither {folder / name} nor {name}.gz: give another --data.pairs")
