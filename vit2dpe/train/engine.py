"""The training loop of a classifier: AdamW and schedule from timm, one step after the other, nothing hidden.

Every random draw is keyed by (seed, epoch, step, purpose), so an epoch's order or a step's augmentation can be drawn
again without having drawn what came before.
"""

from __future__ import annotations

import csv
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..errors import ConfigError
from ..resolution import evaluate
from .augment import shift_and_flip
from .config import StudyConfig
from .data import Images, Split, normalize, resize

T = TypeVar("T")
Progress = Callable[[dict[str, Any]], None]


def keyed(*key: object) -> int:
    """A 63-bit seed that depends on every part of the key, in order; the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU; a named device that is not there is an error."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def fit(
    model: nn.Module,
    data: Images,
    config: StudyConfig,
    *,
    train_size: tuple[int, int],
    seed: int,
    run: Path,
    progress: Progress = lambda row: None,
    stop_after: int | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place; write `run/metrics.csv` an epoch at a time.

    Args:
        data: images at their native size; training sees them at `train_size`.
        progress: called with the latest numbers about once a second.
        stop_after: stop after so many steps (a smoke run).

    Returns:
        One row an epoch: epoch, step, lr, train_loss, test_top1, test_loss, images_per_s, seconds.
    """
    device = pick_device(config.device)
    model.to(device)
    steps = math.ceil(len(data.train) / _set(config.batch_size))
    epochs = _set(config.epochs)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=_set(config.lr), weight_decay=config.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        min_lr=_set(config.lr) / 100,
        warmup_lr=_set(config.lr) / 100,
        warmup_epochs=config.warmup_epochs,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    train = Split(_resized(data.train.images, train_size), data.train.labels)
    rows, start, step = [], time.monotonic(), 0
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.csv").open("w", newline="") as file, _bar(epochs * steps, run.name) as tick:
        writer = None
        for epoch in range(epochs):
            total, count, began = 0.0, 0, time.monotonic()
            for images, labels in _batches(train, data, config, seed, epoch, device):
                schedule.step_update(step)
                loss = _step(model, optimizer, images, labels, config, keyed(seed, epoch, step, "model"))
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss became {loss} at epoch {epoch}, step {step} of {run.name}")
                step, total, count = step + 1, total + loss * len(labels), count + len(labels)
                tick({"epoch": epoch + 1, "epochs": epochs, "step": step, "train_loss": total / count}, progress)
                if stop_after is not None and step >= stop_after:
                    break
            seconds = time.monotonic() - began
            score = evaluate(model, evaluation_batches(data, train_size))
            row = dict(
                epoch=epoch + 1,
                step=step,
                lr=optimizer.param_groups[0]["lr"],
                train_loss=total / count,
                test_top1=score["top1"],
                test_loss=score["loss"],
                images_per_s=count / seconds,
                seconds=time.monotonic() - start,
            )
            rows.append(row)
            writer = writer or _writer(file, row)
            writer.writerow(row)
            file.flush()
            if stop_after is not None and step >= stop_after:
                break
    return rows


def evaluation_batches(
    data: Images, size: tuple[int, int] | None = None, batch: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised test images in order, at their native size or at `size`."""
    for start in range(0, len(data.test), batch):
        images = data.test.images[start : start + batch]
        images = resize(images, size or tuple(images.shape[-2:]))  # type: ignore[arg-type]
        yield normalize(images, data.mean, data.std), data.test.labels[start : start + batch]


def _batches(
    train: Split, data: Images, config: StudyConfig, seed: int, epoch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(keyed(seed, epoch, "order")))
    for step, index in enumerate(order.split(_set(config.batch_size))):
        generator = torch.Generator().manual_seed(keyed(seed, epoch, step, "augment"))
        images = train.images[index].to(device, non_blocking=True)
        images = shift_and_flip(images, _set(config.shift), bool(config.flip), generator)
        yield normalize(images.float() / 255, data.mean, data.std), train.labels[index].to(device)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, config: StudyConfig, seed: int
) -> float:
    torch.manual_seed(seed)  # dropout, stochastic depth, encodings that draw in training
    model.train()
    with _precision(config.precision, images.device):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    if config.clip_grad > 0:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    optimizer.step()
    return loss.item()


def _precision(name: str, device: torch.device):
    if name not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"precision must be auto, float32 or bfloat16, got {name!r}")
    half = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 images at the training size, once."""
    if tuple(images.shape[-2:]) == size:
        return images
    parts = [(resize(part, size) * 255).round().to(torch.uint8) for part in images.split(1024)]
    return torch.cat(parts)


class _bar:
    """A tqdm bar on a terminal; plain lines, every ten seconds, where output goes to a file."""

    def __init__(self, total: int, name: str) -> None:
        self.total, self.name, self.last_line, self.last_call = total, name, time.monotonic(), 0.0
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=name, leave=False, unit="step")

    def __enter__(self):
        return self.update

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, row: dict[str, Any], progress: Progress) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix(loss=f"{row['train_loss']:.3f}")
        elif now - self.last_line > 10:
            self.last_line = now
            line = f"{self.name}: epoch {row['epoch']}/{row['epochs']}, step {row['step']}/{self.total}"
            print(f"{line}, loss {row['train_loss']:.3f}", file=sys.stderr, flush=True)
        if now - self.last_call > 1:
            self.last_call = now
            progress(row)


def _writer(file: Any, row: dict[str, Any]) -> csv.DictWriter:
    writer = csv.DictWriter(file, list(row))
    writer.writeheader()
    return writer


def _set(value: T | None) -> T:
    if value is None:
        raise ConfigError("a setting is still open: pass the config through vit2dpe.train.config.resolve first")
    return value
