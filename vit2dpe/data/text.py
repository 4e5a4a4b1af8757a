"""Plain text to token ids, the two objectives of language modelling, and batches of both.

Legend: B batch, N tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..files import cache_dir
from .text_settings import TextDataConfig
from .tokenizers import Tokenizer, make_tokenizer

IGNORE = -100  # a label that asks nothing
SHAKESPEARE: dict[str, Any] = {
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}


class TextData(NamedTuple):
    """Token ids of a text, (N,) int64 each, and what they mean."""

    name: str
    train: Tensor
    val: Tensor
    tokenizer: Tokenizer
    digest: str


def load_text(config: TextDataConfig, tokenizer: Tokenizer | None = None, option: str = "--data.path") -> TextData:
    """Read, split and tokenize a text.

    Args:
        config: where it is and how it is read.
        tokenizer: one that is there already, instead of the one that the settings name.
        option: what names another file, for messages.

    Raises:
        DataError: if the file is missing, is no UTF-8, or too short for one sequence of each split.
    """
    if config.path is None and config.url is None:
        raise ConfigError("name the text: --data.path file.txt, or --data.url to download one")
    if not 0 < config.val_share < 1:
        raise ConfigError(f"data.val_share must be in (0, 1), got {config.val_share}")
    path = download(str(config.url), config.sha256, option) if config.path is None else Path(config.path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no text at {path}: give another {option}")
    raw = path.read_bytes()
    try:
        text = raw.decode()[: config.limit]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}): convert it, or read it as another file") from None
    cut = round(len(text) * (1 - config.val_share))
    parts = text[:cut], text[cut:]
    found = tokenizer or make_tokenizer(
        config.tokenizer, parts if config.tokenizer == "chars" else parts[:1], config.vocab
    )
    train, val = (torch.tensor(found.encode(part), dtype=torch.long) for part in parts)
    for name, tokens in (("training", train), ("validation", val)):
        if len(tokens) <= config.context:
            raise DataError(
                f"{path} has {len(tokens)} {name} tokens, a sequence needs {config.context} and one more: "
                "give a longer text or a smaller --data.context"
            )
    return TextData(path.stem, train, val, found, hashlib.sha256(raw).hexdigest())


def download(url: str, sha256: str | None = None, option: str = "--data.path") -> Path:
    """A file from the web, downloaded once into the cache and compared with its digest.

    Raises:
        DataError: if it cannot be had, or is another file than expected.
    """
    path = cache_dir() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rsplit('/', 1)[-1]}"
    if not path.is_file():
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=60) as answer:
                temporary.write_bytes(answer.read())
            os.replace(temporary, path)
        except OSError as error:
            raise DataError(
                f"cannot download {url}: {error}; get the file another way and name it with {option}"
            ) from None
        finally:
            with suppress(OSError):  # renamed, or never made
                temporary.unlink()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(f"{path}, downloaded from {url}, is another file: SHA-256 {found}, expected {sha256}")
    return path
