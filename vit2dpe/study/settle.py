"""What a study of photos leaves open until they are looked at: the size to train at, the sizes to measure at, patches.

Sizes are measured at 1, 1.5, 2 and 3 times the size of training. That one is the largest with which the whole study
takes no longer than `minutes`: a few real steps of its models are timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data.datasets import HELD_OUT
from ..data.photos import Survey, sizes_for, survey
from ..data.settings import patch_for
from ..files import write_atomically
from ..spec import Size, filled, flat, parse_size, show_size
from ..training.devices import pick_device
from ..training.settings import of_size
from ..training.starting_model import Start
from .from_weights import measured, sizes_from
from .jobs import count
from .plan import Plan, Trial, check
from .settings import OPEN, PHOTOS, PRESETS, StudyConfig, resolve
from .trials import digest_of, policies_for

MEASURED = 8  # images of a timed step
MARGIN = 1.2  # processes side by side slow each other down
START_S = 8.0  # of a process


def settle(config: StudyConfig) -> Plan:
    """The plan of a study, with what its settings leave open filled in by the images.

    Raises:
        ConfigError, DataError: before anything is trained, for settings or data that cannot work.
    """
    plan, config = check(config), resolve(config)
    if plan.start is not None:
        given = replace(plan.config, sizes=config.sizes, data=config.data, augment=config.augment)
        return _from_weights(given, plan.start)
    if config.task != "images" or config.data.source.partition(":")[0] not in PHOTOS:
        return plan
    now = flat(config)
    if all(now[name] is not None for name in OPEN):
        return plan
    found = survey(config.data)
    if found is None or not (found.mixed or config.data.name is None):
        return check(filled(config, {name: PRESETS["folder"][name] for name in OPEN}))
    if config.data.source_size is not None:
        found = found._replace(short=min(config.data.source_size))
    if config.data.size is not None:
        return check(at_size(config, config.data.size))
    size, note = _choose(config, found)
    plan = check(at_size(config, size))
    print(f"note: {note}")
    _note_enlarged(plan, found)
    return plan


def _from_weights(config: StudyConfig, start: Start) -> Plan:
    """The plan of a study from weights: their size, unless another one is given or only a smaller one fits."""
    found = survey(config.data) if config.data.source.partition(":")[0] in PHOTOS else None
    if config.data.size is not None or found is None:
        return check(at_size(config, config.data.size or start.size, start), start)
    if config.data.source_size is not None:
        found = found._replace(short=min(config.data.source_size))
    size, note = _choose(config, found, start)
    plan = check(at_size(config, size, start), start)
    print(f"note: {note}")
    _note_enlarged(plan, found)
    return plan


def _note_enlarged(plan: Plan, found: Survey) -> None:
    if larger := [show_size(size) for size in plan.sizes if min(size) > found.short]:
        print(f"note: photos are enlarged at {', '.join(larger)}: their median short side is {found.short}")


def at_size(config: StudyConfig, size: Size, start: Start | None = None) -> StudyConfig:
    """The settings for photos that are trained at this size."""
    if start is not None:
        shift = 0 if config.augment.crop is not None else min(size) // 8
        sizes = measured(size, start.patch or (patch_for(size), patch_for(size)))
        return filled(config, {"augment.shift": shift, "data.size": show_size(size), "sizes": sizes})
    own = (
        of_size(size, photos=True) if config.augment.crop is None else of_size(size, photos=True) | {"augment.shift": 0}
    )
    patch = int(str(config.model.patch or own["model.patch"]))
    return filled(config, own | {"data.size": show_size(size), "sizes": measured(size, (patch, patch))})


def _choose(config: StudyConfig, found: Survey, start: Start | None = None) -> tuple[Size, str]:
    """The size to train at, and why. That of an earlier study of these photos in the same folder stays."""
    names = ["data.root", "minutes", "arch", "model.name", "model.patch", "data.fit", "data.source_size"]
    key = digest_of([*found, *(flat(config)[name] for name in [*names, *(["init"] if start else [])])])
    record = Path(config.run.out) / "size.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(record.read_text())
        if before["photos"] == key:
            size = parse_size(str(before["size"]))
            return size, f"trained at {before['size']}, as before ({record}); --train-size chooses another"
    squares = [(side, side) for side in reversed(sizes_for(found, config.model.patch))]
    sizes = squares if start is None else sizes_from(start)
    if config.smoke:
        size = sizes[-1] if start is None else sizes[0]
        return size, f"trained at {show_size(size)}: two steps are no time to choose by"
    limit = f"{found.short} is the photos' median short side" if start is None else "the size of the weights"
    size, minutes, first = sizes[0], 0.0, 0.0
    for size in sizes:
        minutes = estimate(check(at_size(config, size, start), start), found, config.minutes)
        first = first or minutes
        if minutes <= config.minutes:
            break
    if minutes > config.minutes:
        note = (
            f"trained at {show_size(size)}: about {minutes:.0f} minutes, no size fits into --minutes "
            f"{config.minutes:g}; fewer --encodings, --epochs or --limit-train make it shorter"
        )
    else:
        why = limit if size == sizes[0] else f"the largest size that fits into --minutes {config.minutes:g}"
        if start is not None and size != sizes[0]:
            why += f"; {show_size(sizes[0])}, the size of the weights, would take about {first:.0f}"
        note = f"trained at {show_size(size)}, about {minutes:.1f} minutes in all: {why}; --train-size chooses another"
    written = size[0] if size[0] == size[1] else show_size(size)
    write_atomically(record, json.dumps({"size": written, "photos": key}).encode())
    return size, note


def estimate(plan: Plan, found: Survey, enough: float = float("inf")) -> float:
    """Minutes that a study takes, from a few real steps of each of its models.

    Args:
        plan: of the study.
        found: its images.
        enough: where so many minutes are surely exceeded, the models that are left are taken to be like those before.
    """
    config, device = plan.config, pick_device(plan.config.run.device)
    jobs = count(config.jobs, config.run.threads, device, len(plan.trials))
    trained = min(found.images, config.data.limit_train or found.images) * (1 - HELD_OUT)
    tested = min(found.images * HELD_OUT, config.data.limit_test or found.images)
    rounds = config.seeds / jobs * MARGIN
    threads = torch.get_num_threads()
    torch.set_num_threads(config.run.threads or (threads if jobs == 1 else 1))
    seconds = START_S if jobs > 1 else 0.0
    try:
        trials = [trial for trial in plan.trials if trial.seed == 0]
        for done, trial in enumerate(trials, 1):
            seconds += rounds * _seconds(plan, trial, trained, tested, device)
            if seconds * len(trials) / done > 1.5 * enough * 60:  # encodings differ by less
                seconds *= len(trials) / done
                break
    finally:
        torch.set_num_threads(threads)
    return seconds / 60


def _seconds(plan: Plan, trial: Trial, trained: float, tested: float, device: torch.device) -> float:
    """Seconds of one trial: its training, and its measurement at every size."""
    config, model = plan.config, plan.model_spec(trial, classes=2).build().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = (
        torch.randn(MEASURED, 3, *plan.train_size, device=device),
        torch.arange(MEASURED, device=device) % 2,
    )

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    steps = config.optim.epochs * trained / MEASURED
    total = steps * _timed(step, device)
    model.eval()
    rows = len(config.modes) * len(config.temperatures) * len(policies_for(plan, model))
    for size in (plan.train_size, *plan.sizes):
        few = torch.randn(2, 3, *size, device=device)

        @torch.inference_mode()
        def forward(few: torch.Tensor = few) -> None:
            model(few)

        each = _timed(forward, device) / len(few)
        total += each * tested * (config.optim.epochs if size is plan.train_size else rows)
        if config.finetune and size != plan.train_size:
            total += each * 3 * config.finetune * trained
    return total


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of the quicker one of two runs, after another one."""
    seconds = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
