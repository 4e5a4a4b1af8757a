"""`vit2dpe study --task text`: train at one length, measure at others; and the sequence tasks over depth.

The twin of the resolution study on one axis: the same columns (height 1, width the length), the same picture and
pages. A cell is one encoding, one depth, one seed; a finished one is never trained again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.text import SHAKESPEARE, TextData, load_text
from ..data.text_settings import TextDataConfig
from ..encodings import ENCODINGS, parse
from ..errors import ConfigError, unknown
from ..files import write_atomically
from ..models.spec import ModelSpec
from ..resolution.apply import policies_of, use_policy
from ..resolution.policies import POLICIES, TEMPERATURES
from ..seeding import derive_seed
from ..spec import parse_terms, split_words
from ..training.checkpoint import load_run, save_model
from ..training.devices import pick_device, precision
from ..training.settings import OptimConfig, RunConfig
from ..training.task import Task
from ..training.tasks.language import LanguageTask, token_loss, windows
from ..training.tasks.sequences import SequenceTask, answers
from .jobs import Progress, count, each
from .report import Report, about_study, write_settings
from .rows import read_rows, to_csv
from .settings import StudyConfig
from .trials import digest_of, finished, slug, train_cell

STEPS = 100  # updates of an epoch
LAST = 64  # tokens at the end of a window that are measured by themselves too
_TRAINING = (
    "task", "train_length", "embed_scale", "width", "heads", "mlp_ratio", "epochs", "batch_size", "lr", "weight_decay",
    "warmup_epochs", "drop_path", "clip_grad", "precision", "smoke",
)  # fmt: skip


class Plan(NamedTuple):
    """A study's settings, read and checked."""

    config: StudyConfig
    encodings: list[str]
    length: int
    lengths: list[int]
    depths: list[int]
    policies: list[str]
    temperatures: list[str]


def study_text(config: StudyConfig, command: str = "") -> Path:
    """Run it and write what a study writes; see `study.study`.

    Raises:
        ConfigError, DataError: before anything is trained, for settings or data that cannot work.
    """
    plan = check(config)
    config, device = plan.config, pick_device(plan.config.device)
    text = None
    if config.task == "text":
        length = max(plan.length, *plan.lengths)
        data = TextDataConfig(
            path=config.root, context=length, limit=20 * length if config.smoke else None, **SHAKESPEARE
        )
        text = load_text(data, option="--root")  # the download serves where no file is named
        if config.limit_test and not config.smoke:
            text = text._replace(val=text.val[: max(config.limit_test, length) + 1])
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_settings(out, config)
    source = (text.name, text.digest) if text else (f"{config.task}, drawn from its seed", "")
    about = about_study(command, config, device, *source)
    about["tables"] = "learned tables start at N(0, 0.02), truncated"
    write_atomically(out / "env.json", json.dumps(about, indent=1).encode())
    cells = [(w, depth, seed) for seed in range(config.seeds) for depth in plan.depths for w in plan.encodings]
    report = Report(out, about, total=len(cells), started=time.monotonic())
    jobs = count(config.jobs, config.threads, device, len(cells))
    fixed = (plan, text, out / "cells")
    for i, rows in each(run_cell, fixed, cells, report.progress, jobs=jobs, threads=config.threads):
        word, depth, seed = cells[i]
        several = f", depth {depth}" * (len(plan.depths) > 1) + f", seed {seed}" * (config.seeds > 1)
        report.add(i, word + several, rows)
    return report.finish()


def check(config: StudyConfig) -> Plan:
    """Everything that can be refused before data are read."""
    words = list(ENCODINGS) if config.encodings == "all" else split_words(str(config.encodings))
    for word in words:
        parse(word)
    length = int(config.train_length or 0)
    lengths = _numbers("lengths", config.lengths or str(length))
    depths = _numbers("depths", config.depths or str(config.depth))
    temperatures = split_words(config.temperatures)
    for name in temperatures:
        if name not in ("none", *TEMPERATURES):
            raise unknown("temperature", name, ["none", *TEMPERATURES])
    policies = split_words(config.policies)
    for policy in policies:
        parse_terms(policy, "policy", ["all", "default", *POLICIES])
    if not words or min([length, *lengths, *depths]) < 1 or config.seeds < 1 or int(config.epochs or 0) < 1:
        raise ConfigError("a study needs at least one encoding, one length, one depth, one seed and one epoch")
    precision(config.precision, pick_device(config.device))
    plan = Plan(config, words, length, lengths, depths, policies, temperatures)
    with torch.device("meta"):
        for word in words:
            _spec(plan, word, depths[0], 2).build()
    return plan


def run_cell(
    plan: Plan, text: TextData | None, cells: Path, word: str, depth: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of one cell: read where they are finished, else trained and measured."""
    config, device = plan.config, pick_device(plan.config.device)
    trained: dict[str, Any] = {name: getattr(config, name) for name in _TRAINING}
    trained |= dict(encoding=word, depth=depth, seed=seed, data=text.digest if text else config.task)
    folder = cells / f"{slug(word)}-depth{depth}-seed{seed}-{digest_of(trained)}"
    results = folder / f"sweep-{digest_of((plan.lengths, plan.policies, plan.temperatures))}.csv"
    if results.is_file():
        print(f"{word}, depth {depth}, seed {seed}: finished before, read from {results}")
        return read_rows(results)
    if finished(folder, trained):
        model = load_run(folder, device)
    else:
        spec = _spec(plan, word, depth, text.tokenizer.size if text else 10)
        torch.manual_seed(derive_seed(seed, "init"))
        model = spec.build()
        said = partial(progress, f"{word}, depth {depth}", seed)
        final = train_cell(model, *_training(plan, text, seed), folder=folder, said=said, smoke=config.smoke)
        save_model(folder / "last", model, spec.arguments, trained=trained, final=final)
    rows = list(_measured(plan, text, model.to(device), depth))
    rows = [dict(encoding=word, seed=seed, train_height=1, train_width=plan.length, height=1, **row) for row in rows]
    write_atomically(results, to_csv(rows).encode())
    return read_rows(results)


def _measured(plan: Plan, text: TextData | None, model: nn.Module, depth: int) -> Iterator[dict[str, Any]]:
    able, device = policies_of(model), next(model.parameters()).device
    wanted = able if "all" in plan.policies else [p for p in plan.policies if p.split("(")[0] in (*able, "default")]
    if max(plan.lengths) <= plan.length:
        wanted = able[:1]  # up to the training length a policy changes nothing
    for policy in wanted or able[:1]:
        for temperature in plan.temperatures:
            for length in plan.lengths:
                same = dict(policy=policy, temperature=temperature, width=length)
                with use_policy(model, policy, temperature=temperature):
                    if text is None:
                        score = answers(model, plan.config.task, length, device=device)
                        exact = score.pop("exact")
                        yield dict(**same, mode=f"depth {depth}", metric="exact", value=exact, **score)
                        continue
                    for mode, found in text_scores(model, text.val, length, device).items():
                        mode = mode if len(plan.depths) == 1 else f"{mode}, depth {depth}"
                        yield dict(**same, mode=mode, metric="perplexity", value=math.exp(found["loss"]), **found)


@torch.no_grad()
def text_scores(model: nn.Module, text: Tensor, length: int, device: torch.device | str = "cpu") -> dict[str, dict]:
    """{"all tokens": ..., "last 64 tokens": ...} of windows of a length, each with top1 (percent), loss (nats) and n.

    The mean over a long window hides what happens at its end: most of its tokens look back no further than in training.
    """
    model.eval()
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for batch in windows(text, length):
        logits, labels = model(batch["tokens"].to(device)), batch["labels"].to(device)
        for i, last in enumerate((length, LAST)):
            part, wanted = logits[:, -last:], labels[:, -last:]
            right = (part.argmax(-1) == wanted).sum()
            sums[i] += torch.tensor([float(token_loss(part, wanted, "sum")), float(right), wanted.numel()])
    names = ("all tokens", f"last {LAST} tokens")
    return {
        name: dict(loss=loss / n, top1=100 * right / n, n=int(n))
        for name, (loss, right, n) in zip(names, sums.tolist(), strict=True)
    }


def _spec(plan: Plan, word: str, depth: int, vocab_size: int) -> ModelSpec:
    config = plan.config
    arguments: dict[str, Any] = dict(
        position=word,
        vocab_size=vocab_size,
        context=plan.length,
        embed_dim=config.width,
        depth=depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
        embed_scale=config.embed_scale,
    )
    if config.task == "text":
        return ModelSpec("TextDecoder", arguments)
    return ModelSpec("TextEncoder", arguments | dict(pool="", num_classes=vocab_size))


def _training(plan: Plan, text: TextData | None, seed: int) -> tuple[Task, OptimConfig, RunConfig]:
    config = plan.config
    optim = OptimConfig(
        lr=float(config.lr or 0),
        weight_decay=config.weight_decay,
        warmup_epochs=min(config.warmup_epochs, int(config.epochs or 1) / 10),
        epochs=int(config.epochs or 1),
        batch_size=int(config.batch_size or 1),
        clip_grad=config.clip_grad,
    )
    run = RunConfig(seed=seed, device=config.device, precision=config.precision)
    device = pick_device(config.device)
    if text is None:
        return SequenceTask(config.task, plan.length, optim.batch_size, STEPS, seed=seed, device=device), optim, run
    return LanguageTask(text, plan.length, optim.batch_size, STEPS, seed=seed, device=device), optim, run


def _numbers(name: str, text: str) -> list[int]:
    words = split_words(text)
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ConfigError(f"--{name} are whole numbers above 0, separated by commas, got {text!r}")
    return [int(word) for word in words]
