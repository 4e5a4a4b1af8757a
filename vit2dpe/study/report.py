"""What a study leaves behind for people: the table, the picture, the summary, one HTML page without a network."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files import write_atomically
from ..training.run_folder import environment
from .html import Study, page
from .pictures import draw
from .rows import to_csv
from .settings import EvaluateConfig, StudyConfig, as_dict
from .tables import Row, best, metric_of, table


def about_study(
    command: str, config: StudyConfig | EvaluateConfig, device: torch.device, data: str, digest: str
) -> dict[str, Any]:
    """`runs.environment`, the data with the start of their digest in one phrase, and all settings."""
    told = f"{data} (sha256 {digest[:12]})" if digest else data
    facts = environment(command, device, told, digest) | dict(config=as_dict(config))
    del facts["argv"]  # a page that is passed on says the command, not where it lies
    return facts


class Report:
    """Collects rows cell by cell and writes every file anew each time, so that a stopped study is readable."""

    def __init__(self, out: Path, about: dict[str, Any], total: int, started: float) -> None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise ConfigError('a study draws with matplotlib: pip install "vit2dpe[recipes]"') from None
        self.out, self.about, self.total, self.started = out, about, total, started
        self.cells: dict[int, list[Row]] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.drawn = float("-inf")

    @property
    def picture(self) -> Path:
        return self.out / "accuracy_vs_size.png"

    def progress(self, word: str, seed: int, row: Row) -> None:
        """Called while a cell trains; redraws at most every 20 seconds."""
        self.curves.setdefault(f"{word}, seed {seed}", []).append((row["step"], row["train_loss"]))
        if time.monotonic() - self.drawn > 20:
            self._draw(f"training {word}, seed {seed}, epoch {row['epoch']} of {row['epochs']}")

    @property
    def rows(self) -> list[Row]:
        """Of all finished cells, in the order of the plan, whichever was finished first."""
        return [row for i in sorted(self.cells) for row in self.cells[i]]

    @property
    def finished(self) -> int:
        return len(self.cells)

    def add(self, place: int, name: str, rows: list[Row]) -> None:
        """A finished cell, its place among them, and what it is called on the screen."""
        self.cells[place] = rows
        write_atomically(self.out / "results.csv", to_csv(self.rows).encode())
        at_train = [r["value"] for r in rows if (r["height"], r["width"]) == (r["train_height"], r["train_width"])]
        metric = metric_of(rows)
        seen = f", {metric.name} {at_train[0]:.1f} at the training {metric.over.split()[-1]}" if at_train else ""
        minutes = (time.monotonic() - self.started) / 60
        print(f"[{self.finished}/{self.total}] {name}{seen} ({minutes:.1f} min)", flush=True)
        self._draw("")
        self._write(minutes)

    def finish(self) -> Path:
        print(f"\n{table(self.rows)}\n")
        print(f"table    {self.out / 'results.csv'}")
        print(f"report   {self.out / 'report.html'}")
        print(f"picture  {self.picture}")
        grid = "14x14" if metric_of(self.rows).over == "image size" else "64"
        print(f"next     vit2dpe show {' '.join(shlex.quote(w) for w in best(self.rows)[:2])} --grid {grid}")
        return self.picture

    def _draw(self, status: str) -> None:
        self.drawn = time.monotonic()
        figure = draw(self.rows, self.curves, status)
        temporary = self.picture.with_name(f".{self.picture.name}.tmp.png")
        figure.savefig(temporary, dpi=110)
        temporary.replace(self.picture)

    def _write(self, minutes: float) -> None:
        state = "" if self.finished == self.total else f"**{self.finished} of {self.total} cells finished.**\n\n"
        seeds = sorted({int(row["seed"]) for row in self.rows})
        lines = [
            f"# {metric_of(self.rows).study}",
            "",
            f"{state}    {self.about['command']}",
            "",
            f"{self.about['data']}; seeds {seeds}; {minutes:.1f} minutes on {self.about['hardware']}; "
            f"torch {self.about['torch']}, timm {self.about['timm']}, vit2dpe {self.about['vit2dpe']}."
            + (f" Here {self.about['tables']}." if "tables" in self.about else ""),
            "",
            table(self.rows),
            "",
            "![accuracy over size](accuracy_vs_size.png)",
            "",
        ]
        text = "\n".join(lines)
        write_atomically(self.out / "summary.md", text.encode())
        study = Study(self.out.resolve().name, self.rows, self.about)
        write_atomically(self.out / "report.html", page([study]).encode())


def write_settings(out: Path, config: StudyConfig) -> None:
    import yaml

    write_atomically(out / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False).encode())


__all__ = ["Report", "about_study", "best", "draw", "metric_of", "table", "write_settings"]
