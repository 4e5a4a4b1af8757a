"""Reads plain text files, or downloads them: token ids of a training and a validation part.

Legend: B batch, N tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, TrainingError
from ..files import cache_dir, write_atomically
from .text_settings import TextDataConfig
from .tokenizers import Tokenizer, make_tokenizer

IGNORE = -100  # a label that the loss leaves out


class Download(TypedDict):
    url: str
    sha256: str


SHAKESPEARE: Download = {
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}


class TextData(NamedTuple):
    """Token ids of a text, (N,) int64 each, and their tokenizer."""

    name: str
    train: Tensor
    val: Tensor
    tokenizer: Tokenizer
    digest: str


def load_text(config: TextDataConfig, tokenizer: Tokenizer | None = None, option: str = "--data.path") -> TextData:
    """Read, split and tokenize a text.

    Args:
        config: where it is and how it is read.
        tokenizer: an existing one, instead of that of the settings.
        option: the option that names a file, for messages.

    Raises:
        DataError: if the file is missing, is no UTF-8, or too short for one sequence of each split.
    """
    if config.path is None and config.url is None:
        raise ConfigError("name the text: --data.path file.txt, or --data.url to download one")
    path = download(str(config.url), config.sha256, option) if config.path is None else Path(config.path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no text at {path}: give another {option}")
    raw = path.read_bytes()
    text = decode_utf8(raw, path)[: config.limit]
    cut = round(len(text) * (1 - config.val_share))
    splits = text[:cut], text[cut:]
    if tokenizer is None:
        learned_from = splits if config.tokenizer == "chars" else splits[:1]
        tokenizer = make_tokenizer(config.tokenizer, learned_from, config.vocab)
    train, val = (torch.tensor(tokenizer.encode(split), dtype=torch.long) for split in splits)
    for name, tokens in (("training", train), ("validation", val)):
        if len(tokens) <= config.context:
            raise DataError(
                f"{path} has {len(tokens)} {name} tokens, a sequence needs {config.context} and one more: "
                "give a longer text or a smaller --data.context"
            )
    return TextData(path.stem, train, val, tokenizer, hashlib.sha256(raw).hexdigest())


def decode_utf8(raw: bytes, path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: naming `path`, if it is not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): convert it, or give another file") from None


def download(url: str, sha256: str | None = None, option: str = "--data.path") -> Path:
    """A file from the web, downloaded once into the cache; its digest is compared each time.

    Raises:
        DataError: if it cannot be downloaded, or its digest is another.
    """
    path = cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rsplit('/', 1)[-1]}"
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # torch.hub's download waits for ever
                write_atomically(path, answer.read())
        except (OSError, TrainingError) as error:
            raise DataError(
                f"cannot download {url}: {error}; get the file another way and name it with {option}"
            ) from None
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and actual != sha256:
        raise DataError(f"{path}, downloaded from {url}, is another file: SHA-256 {actual}, expected {sha256}")
    return path
