"""`vit2dpe study`: train a ViT with each encoding at one size, change the resolution, see which encoding survives.

A cell is one encoding with one seed. It is trained, measured and written at once; run again, the same command trains
only what is missing. Ctrl-C loses no finished cell.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from ..data.datasets import load, write_unreadable
from ..data.settings import DataConfig
from ..errors import unknown
from ..files import write_atomically
from ..training.devices import pick_device
from ..training.tasks.sequences import SEQUENCES
from .jobs import count, each
from .plan import check
from .report import Report, about_study, write_settings
from .rows import COLUMNS, read_rows, to_csv
from .settings import StudyConfig, check_task, resolve
from .trials import run_cell

TASKS = ("images", "text", *SEQUENCES)


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
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    check_task(config)
    if config.task != "images":
        from .text_study import study_text

        return study_text(resolve(config), command)
    plan = check(config)
    config = plan.config
    source = DataConfig(config.data, config.root, None, config.source_size, config.limit_train, config.limit_test)
    data = load(replace(source, unreadable=config.unreadable))
    for note in data.notes:
        print(f"note: {note}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_settings(out, config)
    write_unreadable(out, data.unreadable)
    about = about_study(command, config, pick_device(config.device), config.data, data.digest)
    about |= dict(images=data.used)
    write_atomically(out / "env.json", json.dumps(about, indent=1).encode())
    print(f"{len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes; results in {out}")

    cells = [(word, seed) for seed in range(config.seeds) for word in plan.encodings]
    report = Report(out, about, total=len(cells), started=time.monotonic())
    jobs = count(config.jobs, config.threads, pick_device(config.device), len(cells))
    fixed = (plan, data, out / "cells")
    for i, rows in each(run_cell, fixed, cells, report.progress, jobs=jobs, threads=config.threads):
        word, seed = cells[i]
        report.add(i, word if config.seeds == 1 else f"{word}, seed {seed}", rows)
    return report.finish()


__all__ = ["COLUMNS", "check", "read_rows", "study", "to_csv", "write_settings"]
