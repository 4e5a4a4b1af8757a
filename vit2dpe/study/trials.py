"""A cell of a resolution study: one encoding with one seed, trained, measured and written at once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.datasets import Images
from ..data.settings import AugmentConfig
from ..files import write_atomically
from ..resolution.sweep import policies_of, sweep
from ..seeding import derive_seed
from ..training.checkpoint import load_run, read_meta, save_model
from ..training.devices import pick_device
from ..training.engine import fit
from ..training.initial_weights import load_weights
from ..training.settings import OptimConfig, RunConfig
from ..training.task import Task
from ..training.tasks.classification import ImageTask, evaluation_batches
from .jobs import Progress
from .plan import Plan, arguments, build
from .rows import read_rows, to_csv

# What a finished training depends on; anything else may change between runs of one folder.
_TRAINING = (
    "train_size", "patch", "width", "depth", "heads", "mlp_ratio", "epochs", "batch_size", "lr",
    "weight_decay", "warmup_epochs", "drop_path", "label_smoothing", "shift", "flip", "clip_grad", "precision", "smoke",
)  # fmt: skip
_SWIN = ("arch", "stages", "window")


def train_cell(
    model: nn.Module,
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    *,
    folder: Path,
    said: Callable[[dict[str, Any]], None],
    smoke: bool,
) -> dict[str, Any]:
    """Train a cell's model in its folder, two steps of it to see whether it runs; the last row of its curve."""
    return fit(model, task, optim, run, folder=folder, progress=said, stop_after=2 if smoke else None)[-1]


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
        torch.manual_seed(derive_seed(seed, "init"))
        model = build(plan, word, len(data.mean), len(data.classes))
        said = partial(progress, word, seed)
        final = train_cell(model, *training(plan, data, seed), folder=folder, said=said, smoke=config.smoke)
        save_model(
            folder / "last",
            model,
            arguments(plan, word, len(data.mean), len(data.classes)),
            trained=trained,
            classes=list(data.classes),
            mean=list(data.mean),
            std=list(data.std),
            final=final,
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
        torch.manual_seed(derive_seed(seed, "init"))
        model = build(at_size, word, len(data.mean), len(data.classes))
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


class _Batches:
    """Test batches at native size, iterated as often as the sweep has rows."""

    def __init__(self, data: Images) -> None:
        self.data = data

    def __iter__(self):
        return evaluation_batches(self.data)


def finished(folder: Path, trained: dict[str, Any]) -> bool:
    return (folder / "last" / "model.json").is_file() and read_meta(folder / "last").get("trained") == trained


def digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def slug(word: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+=]+", "_", word).strip("_")
