"""The files that a study writes for readers: the table, the picture, the summary, one HTML page without a network."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import write_atomically
from ..plots.figures import need_matplotlib
from ..spec import Plain, Settings, plain
from ..training.run_folder import environment
from .answers import ANSWERS, Right, write_answers
from .heatmaps import draw as draw_cells
from .html import Facts, Study, encoded, page
from .pictures import draw
from .rows import Row, to_csv
from .tables import best, depths_of, metric_of, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def about_study(command: str, config: Settings, device: torch.device, data: str, digest: str) -> Facts:
    """The content of env.json: `run_folder.environment`, the data with the start of their digest, and all settings."""
    source = f"{data} (sha256 {digest[:12]})" if digest else data
    facts = environment(command, device, source, digest) | dict(config=plain(config))
    del facts["argv"]  # pages are passed on: the command, but not the paths of this machine
    return facts


class Report:
    """Collects rows trial by trial and writes every file anew each time, so that a stopped study is readable.

    Args:
        out: folder of the study.
        about: content of env.json.
        total: number of trials.
        started: `time.monotonic()` at the start.
    """

    def __init__(self, out: Path, about: Facts, total: int, started: float) -> None:
        need_matplotlib()
        self.out, self.about, self.total, self.started = out, about, total, started
        self.trials: dict[int, tuple[list[Row], Sequence[Right]]] = {}
        self.ran: dict[int, tuple[str, Mapping[str, Plain] | None]] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.drawn = float("-inf")

    @property
    def picture(self) -> Path:
        return self.out / "accuracy_vs_size.png"

    @property
    def cells(self) -> Path:
        """The heat-maps of a study of several depths."""
        return self.out / "heatmaps.png"

    @property
    def rows(self) -> list[Row]:
        """Of all finished trials, in the order of the plan, whichever was finished first."""
        return [row for i in sorted(self.trials) for row in self.trials[i][0]]

    @property
    def answers(self) -> list[Right]:
        """Which test images each of these rows has right."""
        return [right for i in sorted(self.trials) for right in self.trials[i][1]]

    @property
    def study(self) -> Study:
        several = {"hardware": self.machines} if self.machines else {}
        return Study(self.out.resolve().name, self.rows, self.about | several, self.answers)

    @property
    def machines(self) -> str:
        """Which trials were trained where, if that was not the same for all: their numbers are of several machines."""
        groups: dict[str, list[str]] = {}
        for _, (name, ran) in sorted(self.ran.items()):
            groups.setdefault(_place(ran), []).append(name)
        said = (f"{place} ({'; '.join(names)})" for place, names in groups.items())
        return f"several machines: {', '.join(said)}" if len(groups) > 1 else ""

    def progress(self, name: str, seed: int, numbers: Mapping[str, float]) -> None:
        """Called while a trial trains; redraws at most every 20 seconds."""
        self.curves.setdefault(f"{name}, seed {seed}", []).append((int(numbers["step"]), numbers["train_loss"]))
        if time.monotonic() - self.drawn > 20:
            self._draw(f"training {name}, seed {seed}, epoch {numbers['epoch']} of {numbers['epochs']}")

    def add(
        self,
        index: int,
        name: str,
        rows: list[Row],
        answers: Sequence[Right] | None = None,
        ran: Mapping[str, Plain] | None = None,
    ) -> None:
        """Add a finished trial: its index in the plan, its name on the screen, its rows, what each has right, where it
        was trained (`trials.Results`)."""
        self.ran[index] = name, ran
        self.trials[index] = rows, answers or [None] * len(rows)
        table = to_csv(self.rows).encode()
        write_atomically(self.out / "results.csv", table)
        write_answers(self.out / ANSWERS, self.answers, table)
        at_train = [row.value for row in rows if row.size == row.train_size]
        metric = metric_of(rows)
        value = f", {metric.name} {at_train[0]:.1f} at the training {metric.over.split()[-1]}" if at_train else ""
        minutes = (time.monotonic() - self.started) / 60
        print(f"[{len(self.trials)}/{self.total}] {name}{value} ({minutes:.1f} min)", flush=True)
        self._draw("")
        self._write(minutes)

    def finish(self) -> Path:
        """Print the table, the verdict, where the files are and what to look at; returns the path of the picture."""
        print(f"\n{table(self.rows)}\n")
        found = self.study.verdict
        print(f"{found.text()}\n" if found else "")
        print(f"note: trained on {self.machines}\n" if self.machines else "", end="")
        print(f"table    {self.out / 'results.csv'}")
        print(f"report   {self.out / 'report.html'}")
        print(f"picture  {self.picture}")
        if depths_of(self.rows):
            print(f"cells    {self.cells}")
        grid = "14x14" if metric_of(self.rows).over == "image size" else "64"
        word = {row.subject: row.encoding for row in self.rows}
        first = list(dict.fromkeys(word[subject] for subject in best(self.rows)))[:2]
        print(f"look     vit2dpe show {' '.join(map(shlex.quote, first))} --grid {grid}")
        return self.picture

    def _draw(self, status: str) -> None:
        self.drawn = time.monotonic()
        _save(draw(self.rows, self.curves, status), self.picture)
        if depths_of(self.rows):
            _save(draw_cells(self.rows), self.cells)

    def _write(self, minutes: float) -> None:
        done = len(self.trials)
        state = "" if done == self.total else f"**{done} of {self.total} trials finished.**\n\n"
        seeds = sorted({int(row.seed) for row in self.rows if row.seed is not None})
        found = (study := self.study).verdict
        lines = [
            f"# {metric_of(self.rows).study}",
            "",
            *([found.markdown()] if found else []),
            "## The study",
            "",
            f"{state}    {self.about['command']}",
            "",
            f"{self.about['data']}; seeds {seeds}; {minutes:.1f} minutes on {self.study.about['hardware']}; "
            f"torch {self.about['torch']}, timm {self.about['timm']}, vit2dpe {self.about['vit2dpe']}."
            + (f" Here {self.about['tables']}." if "tables" in self.about else ""),
            "",
            table(self.rows),
            "",
            "![accuracy over size](accuracy_vs_size.png)",
            "",
            *(["![accuracy of each depth and size](heatmaps.png)", ""] if depths_of(self.rows) else []),
        ]
        text = "\n".join(lines)
        write_atomically(self.out / "summary.md", encoded(text))
        write_atomically(self.out / "report.html", encoded(page([study])))


def _place(ran: Mapping[str, Plain] | None) -> str:
    """Where a trial was trained."""
    if ran is None:
        return "not recorded"
    return f"{ran['hardware']}, {str(ran['device']).partition(':')[0]}, {ran['precision']}, torch {ran['torch']}"


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


def write_settings(out: Path, config: Settings) -> None:
    """Write `out/config.yaml`, which `vit2dpe study --config` reads."""
    import yaml

    write_atomically(out / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False).encode())


__all__ = ["Report", "about_study", "best", "draw", "metric_of", "table", "write_settings"]
