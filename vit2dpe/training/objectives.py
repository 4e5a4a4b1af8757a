"""What `vit2dpe text train` can be told to learn: for each objective its data, its model, its task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.labelled_text import load_lines
from ..data.pairs import Pairs, load_pairs
from ..data.text import load_text
from ..data.tokenizers import Tokenizer, from_json
from ..errors import CheckpointError
from ..models.spec import ModelSpec
from .checkpoint import read_meta
from .distributed import World
from .settings import model_arguments
from .task import Task
from .tasks.language import LanguageTask
from .tasks.span_corruption import SpanCorruption, SpanTask
from .tasks.text_classification import LineTask
from .tasks.translation import TranslationTask
from .text_settings import TextTrainConfig

SENTINELS = 100


class Prepared(NamedTuple):
    """What there is to train, once the data are read."""

    spec: ModelSpec
    task: Task
    name: str
    digest: str
    amount: str  # of data, for people
    example: str  # a piece of what is held out
    pairs: Pairs | None = None


def model_spec(config: TextTrainConfig, tokens: int, classes: int = 2, own_mask: bool = True) -> ModelSpec:
    """The model that the settings name, for a tokenizer of so many tokens.

    Args:
        own_mask: whether a model that reads alone keeps a row for the token that hides others, as pretraining does.
    """
    model, objective = config.model, config.objective
    arguments = model_arguments(model, norm="norm", mlp="mlp", bias="bias", dropout="drop_rate")
    arguments |= dict(context=config.data.context, attn_drop_rate=model.dropout)
    if objective in ("translate", "spans"):
        size = tokens + (2 + SENTINELS if objective == "spans" else 0)
        arguments |= dict(source_vocab=size, target_vocab=size, shared=True)
        return ModelSpec("Seq2Seq", arguments | model.options)
    arguments |= dict(vocab_size=tokens + (objective != "causal" and own_mask))  # the last one hides others
    if objective == "masked":
        arguments |= dict(pool="", masked_lm=True)
    if objective == "classify":
        arguments |= dict(pool="mean", num_classes=classes)
    return ModelSpec("TextDecoder" if objective == "causal" else "TextEncoder", arguments | model.options)


def prepare(config: TextTrainConfig, device: torch.device, world: World) -> Prepared:
    """Read the data of an objective in `OBJECTIVES`."""
    return OBJECTIVES[config.objective](config, dict(seed=config.run.seed, device=device, world=world))


def _language(config: TextTrainConfig, where: dict[str, Any]) -> Prepared:
    data = load_text(config.data)
    size, context = data.tokenizer.size, config.data.context
    amount = f"{len(data.train):,} training and {len(data.val):,} validation tokens, {size} kinds"
    steps, batch = config.steps_per_epoch, config.optim.batch_size
    task: Task
    if config.objective == "spans":
        collate = SpanCorruption(size + 2 + SENTINELS, stop=size, start=size + 1, sentinels=SENTINELS)
        task = SpanTask(data, collate, context, batch, steps, **where)
    else:
        mask = size if config.objective == "masked" else None
        task = LanguageTask(data, context, batch, steps, mask=mask, **where)
    example = _piece(data.tokenizer, data.val)
    return Prepared(model_spec(config, size), task, data.name, data.digest, amount, example)


def _translation(config: TextTrainConfig, where: dict[str, Any]) -> Prepared:
    data = load_pairs(config.data)
    task = TranslationTask(data, config.optim.batch_size, config.smoothing, **where)
    left = f" ({data.left_out} longer ones left out)" if data.left_out else ""
    amount = f"{len(data.train):,} training pairs{left}, {len(data.val):,} of validation, {data.tokenizer.size} tokens"
    example = data.test[0][0]
    return Prepared(model_spec(config, data.tokenizer.size), task, data.name, data.digest, amount, example, data)


def _classes(config: TextTrainConfig, where: dict[str, Any]) -> Prepared:
    known, size = _of_run(config.init)
    data = load_lines(config.data, known)
    task = LineTask(data, config.optim.batch_size, config.smoothing, **where)
    amount = f"{len(data.train):,} training and {len(data.val):,} validation lines, {len(data.classes)} classes"
    own_mask = known is None or size > data.tokenizer.size
    spec = model_spec(config, data.tokenizer.size, len(data.classes), own_mask)
    return Prepared(spec, task, data.name, data.digest, amount, _piece(data.tokenizer, data.val[0][0]))


def _piece(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The start of the longest of some lines: a text that this tokenizer knows."""
    return max(tokenizer.decode(tokens[:80].tolist()).split("\n"), key=len)[:24]


OBJECTIVES: dict[str, Callable[[TextTrainConfig, dict[str, Any]], Prepared]] = {
    "causal": _language,
    "masked": _language,
    "spans": _language,
    "translate": _translation,
    "classify": _classes,
}


def _of_run(init: str | None) -> tuple[Tokenizer | None, int]:
    """The tokenizer of the run that is started from and the rows of its embedding; None and 0 without a run."""
    folders = [] if init is None else [Path(init).expanduser() / "last", Path(init).expanduser()]
    folder = next((f for f in folders if (f / "model.json").is_file()), None)
    if folder is None:
        return None, 0
    about = read_meta(folder)
    if "tokenizer" not in about:
        raise CheckpointError(f"{init} holds a {about['model']} without a tokenizer: --init takes a run of text")
    return from_json(about["tokenizer"]), int(about["arguments"].get("vocab_size", 0))
