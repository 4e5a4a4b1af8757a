"""Plain text to token ids, the two objectives of language modelling, and batches of both.

Legend: B batch, N tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import math
import os
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from .distributed import ALONE, World, sum_over_ranks
from .images import cache_dir
from .keys import generator
from .task import Batch, Task, described
from .text_config import TextDataConfig
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
    path = fetch(str(config.url), config.sha256, option) if config.path is None else Path(config.path).expanduser()
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


def fetch(url: str, sha256: str | None = None, option: str = "--data.path") -> Path:
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


@dataclass(frozen=True)
class LanguageTask(Task):
    """Language modelling on one long text: random sequences for training, all of the validation text to measure.

    Args:
        data: token ids.
        context: N.
        batch_size: sequences of a step, over all ranks.
        steps_per_epoch: updates between two evaluations.
        mask: id of the token that hides others: the objective is then to say which stood there; None: the next token.
        seed, device, world: as in `ImageTask`.
    """

    data: TextData
    context: int
    batch_size: int
    steps_per_epoch: int
    mask: int | None = None
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    best: tuple[str, str] | None = ("val_loss", "min")
    unit: str = "tokens"

    def batch(self, epoch: int, step: int) -> Batch:
        text, length = self.data.train, self.context + (self.mask is None)
        draws = generator(self.seed, epoch, step, "text")
        start = torch.randint(len(text) - length + 1, (self.batch_size,), generator=draws)
        part = self.world.share(self.batch_size)
        tokens = text[start[part, None] + torch.arange(length)]
        if self.mask is None:
            found = dict(tokens=tokens[:, :-1], labels=tokens[:, 1:])
        else:
            hidden = torch.rand(self.batch_size, length, 2, generator=draws)[part]
            other = torch.randint(self.data.tokenizer.size, (self.batch_size, length), generator=draws)[part]
            found = dict(zip(("tokens", "labels"), hide(tokens, self.mask, hidden, other), strict=True))
        return {name: value.to(self.device, non_blocking=True) for name, value in found.items()} | {
            "index": start[part]
        }

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        return token_loss(model(batch["tokens"]), batch["labels"]), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        loss, n = evaluate_text(model, windows(self.data.val, self.context, self.world, mask=self.mask), self.device)
        if self.world.size > 1:
            total, count = sum_over_ranks([loss * n, n], self.world, torch.device(self.device))
            loss = total / count
        return dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700.0)))

    def describe(self) -> dict[str, Any]:
        task, tokenizer = "language" if self.mask is None else "masked language", self.data.tokenizer.describe()
        return described(task, self.data, context=self.context, tokenizer=tokenizer)


def windows(
    text: Tensor, length: int, world: World = ALONE, *, mask: int | None = None, tokens_a_batch: int = 16_384
) -> Iterator[dict[str, Tensor]]:
    """All whole sequences of a text one after the other, without overlap, in batches; each token predicted once.

    The last rest, shorter than a sequence, is left out. With `mask`, the same tokens are hidden at every call.
    """
    count = (len(text) - 1) // length
    tokens, labels = text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length)
    if mask is not None:
        draws = generator("validation", length, len(text))
        hidden = torch.rand(count, length, 2, generator=draws)
        other = torch.randint(int(text.max()) + 1, (count, length), generator=draws)
        tokens, labels = hide(tokens, mask, hidden, other)
    mine = world.share(count)
    # Every rank has as many batches as the others: sharded models meet in each forward pass.
    batches = math.ceil(math.ceil(count / world.size) * length / tokens_a_batch)
    for i in range(batches):
        part = World(i, batches).share(mine.stop - mine.start)
        cut = slice(mine.start + part.start, mine.start + part.stop)
        yield dict(tokens=tokens[cut], labels=labels[cut])


@torch.no_grad()
def evaluate_text(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], device: torch.device | str = "cpu", last: int | None = None
) -> tuple[float, int]:
    """(mean loss in nats a token, tokens) of a model in evaluation mode; `last`: of the last so many of a sequence."""
    was_training = model.training
    model.eval()
    total, n = 0.0, 0
    try:
        for batch in batches:
            labels = batch["labels"].to(device)
            logits = model(batch["tokens"].to(device))
            if last is not None:
                logits, labels = logits[:, -last:], labels[:, -last:]
            total += float(token_loss(logits, labels, reduction="sum"))
            n += int((labels != IGNORE).sum())
    finally:
        model.train(was_training)
    if n == 0:
        raise DataError("no tokens to evaluate: the text is shorter than one sequence")
    return total / n, n


def token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean", smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in nats over labels that are not IGNORE: logits (B, N, V), labels (B, N)."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORE,
        reduction=reduction,
        label_smoothing=smoothing,
    )


def hide(
    tokens: Tensor, mask: int, draws: Tensor, other: Tensor, *, rate: float = 0.15, special: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """BERT's masking (arXiv 1810.04805): of the tokens chosen, 80% become `mask`, 10% another token, 10% stay.

    Args:
        tokens: (B, N).
        draws: (B, N, 2) uniform in [0, 1): whether a token is chosen, and what becomes of it.
        other: (B, N) random tokens.
        rate: share that is chosen.
        special: ids that are never chosen.

    Returns:
        what the model sees, and labels: the token where one was chosen, IGNORE elsewhere.
    """
    chosen = draws[..., 0] < rate
    for token in special:
        chosen = chosen & (tokens != token)
    fate = draws[..., 1]
    seen = torch.where(chosen & (fate < 0.8), mask, tokens)
    seen = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, seen)
    return seen, torch.where(chosen, tokens, IGNORE)
