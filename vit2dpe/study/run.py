"""`vit2dpe study`: train a model with each encoding at one size, change the resolution, see which encoding survives.

A trial is one encoding, depth and seed. It is trained, measured and written at once; run again, the same command trains
only what is missing. Ctrl-C loses no finished trial.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..data.datasets import write_unreadable
from ..files import write_atomically
from ..spec import changed
from ..training.by_class import CLASSES
from ..training.devices import pick_device
from .jobs import count, each
from .lengths import ExactAnswers, Perplexity
from .own_folder import STUDY, own_folder
from .plan import TASKS, Plan
from .replay import stop_replay
from .report import Report, about_study, write_settings
from .settings import StudyConfig, check_task
from .settle import settle
from .sizes import OverSizes
from .trials import Measure, run_trial


def study(config: StudyConfig, command: str = "") -> Path:
    """Run a study and write `results.csv`, `accuracy_vs_size.png`, `summary.md`, `report.html` under `config.run.out`.

    Where that folder holds another study's results (`own_folder`), under the first of out-2, out-3, ... that does not.

    Args:
        config: settings; those at None take the preset of the task or the data.
        command: what was typed, for the record.

    Returns:
        the path of the picture.

    Raises:
        ConfigError, DataError: before anything is trained, for settings or data that cannot work.
    """
    stop_replay()
    if config.task in TASKS:
        check_task(config)
    plan = settle(config)
    for reason in plan.left_out.values():
        print(f"note: left out: {reason}")
    config, device = plan.config, pick_device(plan.config.run.device)
    measure = prepare(plan)
    out, digest = own_folder(measure)
    config = changed(config, {"run.out": str(out)})
    write_settings(out, config)
    write_unreadable(out, measure.unreadable)
    about = about_study(command, config, device, *measure.source) | measure.facts | {STUDY: digest}
    write_atomically(out / "env.json", json.dumps(about, indent=1).encode())
    report = Report(out, about, total=len(plan.trials), started=time.monotonic())
    jobs = count(config.jobs, config.run.threads, device, len(plan.trials))
    run = partial(run_trial, measure, out / "cells")  # the folder's name since the first version
    threads = config.run.threads
    for i, found in each(run, plan.trials, report.progress, jobs=jobs, threads=threads, encodings=plan.encodings):
        trial = plan.trials[i]
        seed = f", seed {trial.seed}" if config.seeds > 1 else ""
        report.add(i, plan.model_name(trial) + seed, found.rows, found.answers, found.ran)
    if config.per_class:
        measure.write_classes(out / CLASSES, report.rows, report.answers)
    return report.finish()


def prepare(plan: Plan) -> Measure:
    """Load the data of a plan."""
    measures: dict[str, Callable[[Plan], Measure]] = {"images": OverSizes.load, "text": Perplexity.load}
    return measures.get(plan.config.task, ExactAnswers.load)(plan)
