"""`vit2dpe study`: train a ViT with each encoding at one size, change the resolution, see which encoding survives.

A cell is one encoding with one seed. It is trained, measured and written at once; run again, the same command trains
only what is missing. Ctrl-C loses no finished cell.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..encodings import ENCODINGS, parse
from ..errors import ConfigError, unknown
from ..models import Swin, ViT
from ..policies import POLICIES, TEMPERATURES
from ..resolution import MODES, parse_size, policies_of, sweep
from .checkpoint import load_run, read_meta, save_model
from .config import StudyConfig, as_dict, resolve, split_words
from .data import Images, load
from .devices import pick_device, precision
from .engine import fit
from .files import write_atomically
from .init import load_weights
from .jobs import Progress, count, each
from .keys import keyed
from .report import Report, about_study
from .settings import AugmentConfig, DataConfig, OptimConfig, RunConfig
from .task import ImageTask, evaluation_batches

COLUMNS = (
    "encoding", "policy", "temperature", "mode", "seed", "train_height", "train_width", "height", "width",
    "top1", "loss", "n", "metric", "value",
)  # fmt: skip
# What a finished training depends on; anything else may change between runs of one folder.
_TRAINING = (
    "train_size", "patch", "width", "depth", "heads", "mlp_ratio", "epochs", "batch_size", "lr",
    "weight_decay", "warmup_epochs", "drop_path", "label_smoothing", "shift", "flip", "clip_grad", "precision", "smoke",
)  # fmt: skip


_SWIN = ("arch", "stages", "window")
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"vit": ViT, "swin": Swin}


class Plan(NamedTuple):
    """A study's settings, read and checked."""

    config: StudyConfig
    encodings: list[str]
    train_size: tuple[int, int]
    sizes: list[tuple[int, int]]
    modes: list[str]
    policies: list[str]
    temperatures: list[str]


def study(config: StudyConfig, command: str = "") -> Path:
    """Run a study and write `results.csv`, `accuracy_vs_size.png`, `summary.md`, `report.html` under `config.out`.

    Args:
        config: settings; those at None take the preset of the data source.
        command: what was typed, for the record.

    Returns:
        the path of the picture.

    Raises:
        ConfigError, DataError: before anything is trained, for settings or data that cannot work.
    """
    if config.task != "images":
        from .text_study import TASKS, study_text

        if config.task not in TASKS:
            raise unknown("task", config.task, TASKS)
        return study_text(resolve(config), command)
    plan = check(config)
    config = plan.config
    data = load(DataConfig(config.data, config.root, None, config.source_size, config.limit_train, config.limit_test))
    for note in data.notes:
        print(f"note: {note}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_settings(out, config)
    about = about_study(command, config, pick_device(config.device), config.data, data.digest)
    write_atomically(out / "env.json", json.dumps(about, indent=1).encode())
    print(f"{len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes; results in {out}")

    cells = [(word, seed) for seed in range(config.seeds) for word in plan.encodings]
    report = Report(out, about, total=len(cells), started=time.monotonic())
    jobs = count(config.jobs, config.threads, pick_device(config.device), len(cells))
    fixed = (plan, data, out / "cells")
    for i, rows in each(run_cell, fixed, cells, report.progress, jobs=jobs, threads=config.threads):
        report.add(i, cells[i][0], rows)
    return report.finish()


def check(config: StudyConfig) -> Plan:
    """Everything that can be refused before data are read."""
    if config.data not in ("digits", "folder", "cifar10"):
        raise unknown("data source", config.data, ("digits", "folder", "cifar10"))
    config = resolve(config)
    if config.arch not in ARCHITECTURES:
        raise unknown("arch", config.arch, ARCHITECTURES)
    if not all(word.isdigit() and int(word) > 0 for word in split_words(config.stages)):
        raise ConfigError(f"stages are numbers of blocks, such as 2,2, got {config.stages!r}")
    words = list(ENCODINGS) if config.encodings == "all" else split_words(str(config.encodings))
    for word in words:
        parse(word)
    train_size = parse_size(str(config.train_size))
    sizes = [parse_size(size) for size in split_words(str(config.sizes))]
    modes = _known("mode", config.modes, MODES)
    temperatures = _known("temperature", config.temperatures, ["none", *TEMPERATURES])
    policies = split_words(config.policies)
    for policy in policies:
        parse(policy, "policy", ["all", "default", *POLICIES])
    if config.finetune < 0 or (config.finetune and config.arch != "vit"):
        raise ConfigError(
            f"finetune is a number of epochs, 0 or more, of arch vit; got {config.finetune}, {config.arch}"
        )
    if not words or not sizes or config.seeds < 1 or int(config.epochs or 0) < 1:
        raise ConfigError("a study needs at least one encoding, one size, one seed and one epoch")
    precision(config.precision, pick_device(config.device))
    plan = Plan(config, words, train_size, sizes, modes, policies, temperatures)
    with torch.device("meta"):
        for word in words:
            embed: Any = _build(plan, word, channels=3, classes=2).patch_embed
    for size in (train_size, *sizes):
        embed.grid(*size)
    return plan


def run_cell(plan: Plan, data: Images, cells: Path, word: str, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Rows of one encoding with one seed: read where they are finished, else trained and measured."""
    config = plan.config
    names = _TRAINING if config.arch == "vit" else (*_TRAINING, *_SWIN)
    trained = {name: getattr(config, name) for name in names} | dict(encoding=word, seed=seed, data=data.digest)
    measured = (*plan[2:], config.finetune) if config.finetune else plan[2:]
    folder = cells / f"{slug(word)}-seed{seed}-{digest_of(trained)}"
    results = folder / f"sweep-{digest_of(measured)}.csv"
    if results.is_file():
        print(f"{word} seed {seed}: finished before, read from {results}")
        return read_rows(results)
    if finished(folder, trained):
        model = load_run(folder, pick_device(config.device))
    else:
        torch.manual_seed(keyed(seed, "init"))
        model = _build(plan, word, len(data.mean), len(data.classes))
        task, optim, run = training(plan, data, seed)
        curve = fit(
            model,
            task,
            optim,
            run,
            folder=folder,
            progress=lambda row: progress(word, seed, row),
            stop_after=2 if config.smoke else None,
        )
        save_model(
            folder / "last",
            model,
            _arguments(plan, word, len(data.mean), len(data.classes)),
            trained=trained,
            classes=list(data.classes),
            mean=list(data.mean),
            std=list(data.std),
            final=curve[-1],
        )
    able = policies_of(model)
    chosen = able if "all" in plan.policies else [p for p in plan.policies if p.split("(")[0] in (*able, "default")]
    rows = sweep(
        model,
        _Batches(data),
        plan.sizes,
        chosen or able[:1],
        modes=plan.modes,
        temperatures=plan.temperatures,
        train_size=plan.train_size,
    )
    if config.finetune:
        rows += finetuned(plan, data, word, seed, folder)
    rows = [dict(encoding=word, seed=seed, metric="top1", value=row["top1"], **row) for row in rows]
    write_atomically(results, to_csv(rows).encode())
    return read_rows(results)


def finetuned(plan: Plan, data: Images, word: str, seed: int, trained: Path) -> list[dict[str, Any]]:
    """A row for every other size: the trained model after `finetune` epochs at that size, policy "finetuned".

    A tenth of the learning rate, falling from the first step. The idea is FixRes, arXiv 1906.06423; how ours differs:
    all weights are finetuned, not the last layers alone, and the augmentation stays that of training.
    """
    config, found = plan.config, []
    for size in plan.sizes:
        if size == plan.train_size:
            continue
        at_size = plan._replace(train_size=size)
        torch.manual_seed(keyed(seed, "init"))
        model = _build(at_size, word, len(data.mean), len(data.classes))
        load_weights(model, trained)
        task, optim, run = training(at_size, data, seed)
        optim = replace(optim, lr=optim.lr / 10, epochs=config.finetune, warmup_epochs=0)
        folder = trained / f"finetuned-{size[0]}x{size[1]}"
        fit(model, task, optim, run, folder=folder, stop_after=2 if config.smoke else None)
        (row,) = sweep(model, _Batches(data), [size], policies_of(model)[:1], train_size=size)
        height, width = plan.train_size
        found.append(row | dict(policy="finetuned", train_height=height, train_width=width))
    return found


def training(plan: Plan, data: Images, seed: int) -> tuple[ImageTask, OptimConfig, RunConfig]:
    """The study's settings as the training loop takes them."""
    config = plan.config
    task = ImageTask(
        data,
        plan.train_size,
        int(config.batch_size or 1),
        seed=seed,
        device=pick_device(config.device),
        augment=AugmentConfig(config.shift, config.flip, label_smoothing=config.label_smoothing),
    )
    optim = OptimConfig(
        lr=float(config.lr or 0),
        weight_decay=config.weight_decay,
        warmup_epochs=config.warmup_epochs,
        epochs=int(config.epochs or 1),
        batch_size=task.batch_size,
        clip_grad=config.clip_grad,
    )
    run = RunConfig(seed=seed, device=config.device, precision=config.precision)
    return task, optim, run


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class _Batches:
    """Test batches at native size, iterated as often as the sweep has rows."""

    def __init__(self, data: Images) -> None:
        self.data = data

    def __iter__(self):
        return evaluation_batches(self.data)


def _build(plan: Plan, word: str, channels: int, classes: int) -> nn.Module:
    return ARCHITECTURES[plan.config.arch](**_arguments(plan, word, channels, classes))


def _arguments(plan: Plan, word: str, channels: int, classes: int) -> dict[str, Any]:
    config = plan.config
    both = dict(
        position=word,
        img_size=plan.train_size,
        patch_size=config.patch,
        in_chans=channels,
        num_classes=classes,
        embed_dim=config.width,
        mlp_ratio=config.mlp_ratio,
        global_pool="avg",
        drop_path_rate=config.drop_path,
    )
    if config.arch == "vit":
        return both | dict(depth=config.depth, num_heads=config.heads, class_token=False)
    depths = [int(blocks) for blocks in split_words(config.stages)]
    heads = [int(config.heads or 1) * 2**i for i in range(len(depths))]
    return both | dict(depths=depths, num_heads=heads, window_size=config.window)


def finished(folder: Path, trained: dict[str, Any]) -> bool:
    return (folder / "last" / "model.json").is_file() and read_meta(folder / "last").get("trained") == trained


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            {k: v if k in ("encoding", "policy", "temperature", "mode", "metric") else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def _known(kind: str, text: str, known: Iterable[str]) -> list[str]:
    words = split_words(text)
    for word in words:
        if word not in known:
            raise unknown(kind, word, known)
    return words


def digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def slug(word: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+=]+", "_", word).strip("_")


def write_settings(out: Path, config: StudyConfig) -> None:
    import yaml

    write_atomically(out / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False).encode())
