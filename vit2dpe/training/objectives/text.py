"""`vit2dpe text train`: language models (causal, masked, spans), translators, and classifiers of lines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.labelled_text import load_lines
from ...data.pairs import Pairs, load_pairs
from ...data.text import load_text
from ...data.tokenizers import Tokenizer, from_json
from ...encodings import parse_blocks
from ...errors import CheckpointError, ConfigError, unknown
from ...files import write_atomically
from ...models.spec import ModelSpec
from ...models.text.seq2seq import Seq2Seq
from ...models.text.translate import translate
from ..checkpoint import load_run, read_meta
from ..distributed import ALONE
from ..log import Row
from ..session import TrainSession, check_run
from ..settings import drop_last, model_arguments, own_options
from ..task import Batch, Dataset, Task
from ..tasks.language import LanguageTask
from ..tasks.span_corruption import SpanCorruption, SpanTask
from ..tasks.text_classification import LineTask
from ..tasks.translation import TranslationTask, bleu
from ..text_settings import TextTrainConfig, smoke
from .base import Prepared, run

SENTINELS = 100
DECIDED = dict(context="data.context", vocab_size="the data", source_vocab="the data", target_vocab="the data") | dict(
    dict.fromkeys(("shared", "cross", "pool", "masked_lm", "num_classes"), "objective")
)  # arguments of a model that are no options


def train_text(config: TextTrainConfig, command: str = "vit2dpe text train") -> Path:
    """Train a model of text by `config.objective`; arguments, result and errors are those of `run`."""
    return run(check(config), command, prepare)


class TextSource(NamedTuple):
    """Model, task and data of an objective of text; `amount` of data and an `example` of them, for people."""

    spec: ModelSpec
    task: Task[Batch]
    data: Dataset
    amount: str
    example: str


def prepare(config: TextTrainConfig, session: TrainSession) -> Prepared:
    """The objective that the settings name."""
    source = OBJECTIVES[config.objective](config, session)
    data, folder = source.data, session.folder
    return Prepared(
        source.spec,
        source.task,
        data.name,
        data.digest,
        f"; {source.amount}",
        f"{config.model.position} on {data.name}",
        next_command(config, folder, source.example),
        partial(results, config),
        partial(translate_test_set, config, session, data) if isinstance(data, Pairs) else list,
    )


def check(config: TextTrainConfig) -> TextTrainConfig:
    """The settings, after refusing all that can be refused before data are read."""
    if config.objective not in OBJECTIVES:
        raise unknown("objective", config.objective, OBJECTIVES)
    if config.smoothing and config.objective not in ("translate", "classify"):
        raise ConfigError(f"smoothing is for objective translate or classify, not {config.objective}")
    if config.objective == "translate":
        bleu(["is it there?"], ["is it there?"])  # sacrebleu, before hours of training
    if config.smoke:
        config = smoke(config)
    check_run(config)
    parse_blocks(config.model.position)
    with torch.device("meta"):
        model_spec(config, 2).build()
    return config


def model_spec(config: TextTrainConfig, tokens: int, classes: int = 2, own_mask: bool = True) -> ModelSpec:
    """The model that the settings name, for a tokenizer of so many tokens.

    Args:
        own_mask: whether an encoder keeps an embedding for the mask token, as pretraining needs it.
    """
    model, objective = config.model, config.objective
    arguments = model_arguments(model, norm="norm", mlp="mlp", bias="bias", dropout="drop_rate")
    arguments |= dict(context=config.data.context, attn_drop_rate=model.dropout)
    options = own_options(model.options, DECIDED)
    if objective in ("translate", "spans"):
        size = tokens + (2 + SENTINELS if objective == "spans" else 0)
        arguments |= dict(source_vocab=size, target_vocab=size, shared=True)
        return ModelSpec("Seq2Seq", arguments | options)
    arguments |= dict(vocab_size=tokens + (objective != "causal" and own_mask))  # the last one is the mask token
    if objective == "masked":
        arguments |= dict(pool="", masked_lm=True)
    if objective == "classify":
        arguments |= dict(pool="mean", num_classes=classes)
    return ModelSpec("TextDecoder" if objective == "causal" else "TextEncoder", arguments | options)


def _language(config: TextTrainConfig, session: TrainSession) -> TextSource:
    data = load_text(config.data)
    size, context = data.tokenizer.size, config.data.context
    steps, batch = config.steps_per_epoch, config.optim.batch_size
    task: Task
    if config.objective == "spans":
        special = data.tokenizer.special
        corrupt = SpanCorruption(size + 2 + SENTINELS, stop=size, start=size + 1, sentinels=SENTINELS, special=special)
        task = SpanTask(data, context, batch, steps, collate=corrupt, **session.where)
    else:
        mask = size if config.objective == "masked" else None
        task = LanguageTask(data, context, batch, steps, mask=mask, **session.where)
    amount = f"{len(data.train):,} training and {len(data.val):,} validation tokens, {size} kinds"
    return TextSource(model_spec(config, size), task, data, amount, _excerpt(data.tokenizer, data.val))


def _translation(config: TextTrainConfig, session: TrainSession) -> TextSource:
    data = load_pairs(config.data)
    rest = drop_last(config.optim, config.run)
    task = TranslationTask(data, config.optim.batch_size, config.smoothing, rest, **session.where)
    left = f" ({data.left_out} longer ones left out)" if data.left_out else ""
    amount = f"{len(data.train):,} training pairs{left}, {len(data.val):,} of validation, {data.tokenizer.size} tokens"
    return TextSource(model_spec(config, data.tokenizer.size), task, data, amount, data.test[0][0])


def _classes(config: TextTrainConfig, session: TrainSession) -> TextSource:
    known, size = tokenizer_of_run(config.init)
    data = load_lines(config.data, known)
    rest = drop_last(config.optim, config.run)
    task = LineTask(data, config.optim.batch_size, config.smoothing, rest, **session.where)
    amount = f"{len(data.train):,} training and {len(data.val):,} validation lines, {len(data.classes)} classes"
    own_mask = known is None or size > data.tokenizer.size
    spec = model_spec(config, data.tokenizer.size, len(data.classes), own_mask)
    return TextSource(spec, task, data, amount, _excerpt(data.tokenizer, data.val[0][0]))


OBJECTIVES: dict[str, Callable[[TextTrainConfig, TrainSession], TextSource]] = {
    "causal": _language,
    "masked": _language,
    "spans": _language,
    "translate": _translation,
    "classify": _classes,
}


def _excerpt(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """The start of the longest of some lines: a text whose characters the tokenizer has."""
    return max(tokenizer.decode(tokens[:80].tolist()).split("\n"), key=len)[:24]


def tokenizer_of_run(init: str | None) -> tuple[Tokenizer | None, int]:
    """The tokenizer of the run that is started from and the rows of its embedding; None and 0 without a run."""
    folders = [] if init is None else [Path(init).expanduser() / "last", Path(init).expanduser()]
    folder = next((f for f in folders if (f / "model.json").is_file()), None)
    if folder is None:
        return None, 0
    about = read_meta(folder)
    if "tokenizer" not in about:
        raise CheckpointError(f"{init} holds a {about['model']} without a tokenizer: --init takes a run of text")
    return from_json(about["tokenizer"]), int(about["arguments"].get("vocab_size", 0))


def results(config: TextTrainConfig, rows: list[Row]) -> list[str]:
    """Loss, and accuracy of a classifier."""
    best = min((row["val_loss"] for row in rows), default=float("nan"))
    unit = "line" if config.objective == "classify" else "token"
    lines = [f"validation loss {rows[-1]['val_loss']:.4f} nats a {unit} (best {best:.4f})"]
    if config.objective == "classify":
        lines += [f"right {rows[-1]['val_top1']:.1f}% (best {max(row['val_top1'] for row in rows):.1f}%)"]
    return lines


def translate_test_set(config: TextTrainConfig, session: TrainSession, pairs: Pairs) -> list[str]:
    """Translate the test set with the best weights, each process its part; write translations.txt and bleu.json.

    Where not all processes see the run folder, the first translates alone.

    Returns:
        a line about them, of the first process.
    """
    folder, device, world = session.folder, session.device, session.world
    if not all(world.gather(["seen" if (folder / "best" / "model.json").is_file() else ""])):
        if not world.first:
            return []
        world = ALONE
    model = load_run(folder, device, which="best")
    if not isinstance(model, Seq2Seq):
        raise CheckpointError(f"{folder} holds a {type(model).__name__}, not the Seq2Seq that was trained")
    sources, references = zip(*pairs.test, strict=True)
    written = world.gather(translate(model, pairs.tokenizer, sources[world.share(len(sources))], beams=config.beams))
    if not world.first:
        return []
    score = bleu(written, references)
    write_atomically(folder / "translations.txt", "".join(f"{line}\n" for line in written).encode())
    facts = dict(bleu=score.bleu, signature=score.signature, set=config.data.test, n=len(written), beams=config.beams)
    write_atomically(folder / "bleu.json", json.dumps(facts, indent=1).encode())
    return [f"BLEU {score.bleu:.2f} on {len(written)} sentences of {config.data.test} ({score.signature})"]


def next_command(config: TextTrainConfig, folder: Path, example: str) -> str:
    """The command to try next."""
    run = str(folder)
    if config.objective in ("causal", "translate"):
        return shlex.join(["vit2dpe", "text", "sample", "--run", run, "--prompt", example])
    if config.objective == "spans":
        other = "rope" if config.model.position == "t5" else "t5"
        more = ["--config", f"{run}/config.yaml", "--model.position", other, "--run.out", f"{run}_{other}"]
        return shlex.join(["vit2dpe", "text", "train", *more])
    if config.objective == "masked":
        more = ["--objective", "classify", "--data.path", "labelled.tsv", "--run.out", f"{run}_classes", "--init", run]
        return shlex.join(["vit2dpe", "text", "train", *more])
    return shlex.join(["vit2dpe", "show", "--attention", "--text", example, "--run", run])
