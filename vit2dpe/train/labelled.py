"""Classes of short texts: lines of a label, a tab and a text, and a `TextEncoder` that tells the label."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..models.text_model import pad
from .distributed import ALONE, World, sum_over_ranks
from .task import Batch, Task, batch_of, described, steps_of
from .text_config import TextDataConfig
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


@dataclass(frozen=True)
class LineTask(Task):
    """Each training line once an epoch, in an order drawn anew.

    Args:
        data: lines.
        batch_size: lines of a step, over all ranks.
        smoothing: label smoothing of the training loss.
        seed, device, world: as in `ImageTask`.
    """

    data: Lines
    batch_size: int
    smoothing: float = 0.0
    seed: int = 0
    device: torch.device | str = "cpu"
    world: World = ALONE
    best: tuple[str, str] | None = ("val_top1", "max")
    unit: str = "lines"

    @property
    def steps_per_epoch(self) -> int:  # type: ignore[override]
        return steps_of(len(self.data.train), self.batch_size, self.world)

    def batch(self, epoch: int, step: int) -> Batch:
        train = self.data.train
        index = batch_of(len(train), self.batch_size, self.seed, epoch, step)
        index = index[self.world.share(len(index))]
        return self._batch([train[i] for i in index.tolist()]) | {"index": index}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        logits = model(batch["tokens"], batch["valid"])
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.smoothing), {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        lines = sorted(self.data.val, key=lambda line: len(line[0]))
        cuts = [slice(i, i + self.batch_size) for i in range(0, len(lines), self.batch_size)]
        was_training, right, loss = model.training, 0.0, 0.0
        model.eval()
        try:
            for cut in cuts:
                part = lines[cut][self.world.share(len(lines[cut]))]
                batch = self._batch(part or lines[:1])  # sharded models meet in each forward pass
                logits = model(batch["tokens"], batch["valid"]).float()
                if part:
                    right += float((logits.argmax(-1) == batch["labels"]).sum())
                    loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
        finally:
            model.train(was_training)
        right, loss = sum_over_ranks([right, loss], self.world, torch.device(self.device))
        return dict(val_top1=100 * right / len(lines), val_loss=loss / len(lines))

    def describe(self) -> dict[str, Any]:
        tokenizer = self.data.tokenizer.describe()
        return described("text classification", self.data, classes=self.data.classes, tokenizer=tokenizer)

    def _batch(self, lines: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        tokens, valid = pad([ids for ids, _ in lines])
        labels = torch.tensor([label for _, label in lines])
        return {n: t.to(self.device) for n, t in dict(tokens=tokens, valid=valid, labels=labels).items()}
