"""What a study leaves behind for people: the table, the picture, the summary, one HTML page without a network."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError
from .config import EvaluateConfig, StudyConfig, as_dict
from .files import write_atomically
from .html import Study, page
from .runs import environment

Row = dict[str, Any]


class Metric(NamedTuple):
    """How `value` is told: of which study, its name, its unit on an axis, what it is drawn over, and whether more of it
    is better."""

    study: str
    name: str
    unit: str
    over: str
    scale: str
    more_is_better: bool = True


METRICS = {
    "top1": Metric("Resolution study", "top-1 in percent", "top-1 [%]", "image size", "image size [pixels]"),
    "perplexity": Metric("Length study", "perplexity", "perplexity", "length", "length [tokens]", more_is_better=False),
    "exact": Metric("Sequence study", "sequences right in percent", "sequences right [%]", "length", "length [tokens]"),
}


def metric_of(rows: list[Row]) -> Metric:
    return METRICS[rows[0]["metric"] if rows else "top1"]


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

    def add(self, place: int, word: str, rows: list[Row]) -> None:
        """A finished cell and its place among them."""
        from .study import to_csv

        self.cells[place] = rows
        write_atomically(self.out / "results.csv", to_csv(self.rows).encode())
        at_train = [r["value"] for r in rows if (r["height"], r["width"]) == (r["train_height"], r["train_width"])]
        metric = metric_of(rows)
        seen = f", {metric.name} {at_train[0]:.1f} at the training {metric.over.split()[-1]}" if at_train else ""
        minutes = (time.monotonic() - self.started) / 60
        print(f"[{self.finished}/{self.total}] {word}{seen} ({minutes:.1f} min)", flush=True)
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


def default_rows(rows: list[Row]) -> list[Row]:
    """Those of each encoding's first policy, without temperature."""
    first: dict[str, tuple[str, str]] = {}
    for row in rows:
        first.setdefault(row["encoding"], (row["policy"], row["temperature"]))
    return [row for row in rows if (row["policy"], row["temperature"]) == first[row["encoding"]]]


def best(rows: list[Row]) -> list[str]:
    """Encodings, the best mean accuracy over all default rows first."""
    score: dict[str, list[float]] = {}
    for row in default_rows(rows):
        score.setdefault(row["encoding"], []).append(row["value"])
    sign = -1 if metric_of(rows).more_is_better else 1
    return sorted(score, key=lambda word: sign * statistics.mean(score[word]))


def spell(size: tuple[float, float]) -> str:
    h, w = (int(side) for side in size)
    return str(w) if h in (w, 1) else f"{h}x{w}"


def over_depth(rows: list[Row]) -> bool:
    """Whether these are answers to sequences of one length, which are told over the number of blocks."""
    return bool(rows) and rows[0]["metric"] == "exact" and len({row["width"] for row in rows}) == 1


def table(rows: list[Row], spread: Callable[[list[float]], float] = statistics.stdev) -> str:
    """Markdown: the metric over size, a line for each mode, encoding and policy; mean ± `spread` of several seeds.

    Sequences of one length: over depth, a line for each encoding and policy.
    """
    if over_depth(rows):
        return _depth_table(rows, spread)
    sizes = sorted({(r["height"], r["width"]) for r in rows}, key=lambda s: (s[0] * s[1], s))
    train, metric = {(r["train_height"], r["train_width"]) for r in rows}, metric_of(rows)
    cells: dict[tuple, dict[tuple, list[float]]] = {}
    for r in rows:
        key = (r["mode"], r["encoding"], r["policy"], r["temperature"])
        cells.setdefault(key, {}).setdefault((r["height"], r["width"]), []).append(r["value"])
    heads = [f"**{spell(s)}**" if s in train else spell(s) for s in sizes]
    lines = [
        f"{metric.name} over {metric.over}; that of training in bold",
        "",
        "| " + " | ".join(["mode", "encoding", "policy", "temperature", *heads]) + " |",
        "|" + "---|" * 4 + "---:|" * len(sizes),
    ]
    for key, by_size in sorted(cells.items(), key=lambda item: item[0][0] != "scale"):
        numbers = [_mean(by_size.get(size, []), spread) for size in sizes]
        lines.append("| " + " | ".join([*key, *numbers]) + " |")
    return "\n".join(lines)


def _depth_table(rows: list[Row], spread: Callable[[list[float]], float]) -> str:
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    cells: dict[tuple, dict[str, list[float]]] = {}
    for r in rows:
        cells.setdefault((r["encoding"], r["policy"]), {}).setdefault(r["mode"], []).append(r["value"])
    lines = [
        f"{metric_of(rows).name}, sequences of {int(rows[0]['width'])}",
        "",
        "| " + " | ".join(["encoding", "policy", *modes]) + " |",
        "|" + "---|" * 2 + "---:|" * len(modes),
    ]
    for key, by_mode in cells.items():
        lines.append("| " + " | ".join([*key, *(_mean(by_mode.get(mode, []), spread) for mode in modes)]) + " |")
    return "\n".join(lines)


def _mean(values: list[float], spread: Callable[[list[float]], float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {spread(values):.1f}" if len(values) > 1 else mean


def draw(rows: list[Row], curves: dict[str, list[tuple[int, float]]] | None = None, status: str = ""):
    """Accuracy over size, a panel a mode, a colour an encoding: solid its default policy, dashed its best other one.

    Before a cell is finished the panel shows the training loss instead.
    """
    from matplotlib.figure import Figure

    if over_depth(rows):
        return _draw_depths(rows, status)
    modes = list(dict.fromkeys(row["mode"] for row in rows)) or [""]
    figure = Figure(figsize=(6.2 * len(modes) + 1.6, 5), layout="constrained")
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    if not rows:
        for name, curve in (curves or {}).items():
            axes[0].plot(*zip(*curve, strict=True), label=name)
        axes[0].set(xlabel="step", ylabel="training loss", title="no encoding is finished yet")
        axes[0].legend()
    colours = {word: f"C{i}" for i, word in enumerate(dict.fromkeys(row["encoding"] for row in rows))}
    for ax, mode in zip(axes, modes, strict=True):
        if not rows:
            break
        _panel(ax, [row for row in rows if row["mode"] == mode], colours)
        more = {"scale": ": the same picture with more pixels", "canvas": ": more content at the scale of training"}
        ax.set_title(mode + more.get(mode, ""), fontsize=10)
    if rows:
        axes[0].set_ylabel(metric_of(rows).unit)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(
        f"{metric_of(rows).name} over {metric_of(rows).over}{f' ({status})' if status else ''}", fontsize=11
    )
    return figure


def _draw_depths(rows: list[Row], status: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    ax, metric, shown = figure.subplots(), metric_of(rows), default_rows(rows)
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for i, word in enumerate(dict.fromkeys(row["encoding"] for row in rows)):
        x = [at + 0.03 * i for at in range(len(modes))]  # so that equal lines are told apart
        cells = [[r["value"] for r in shown if (r["encoding"], r["mode"]) == (word, mode)] for mode in modes]
        ax.plot(x, [statistics.mean(v) if v else float("nan") for v in cells], "o-", label=word, ms=4)
    ax.set_xticks(range(len(modes)), [mode.removeprefix("depth ") for mode in modes])
    ax.set(xlabel="depth [blocks]", ylabel=metric.unit, ylim=(-4, 104))
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{metric.name} over depth{f' ({status})' if status else ''}", fontsize=11)
    return figure


def _panel(ax, rows: list[Row], colours: dict[str, str]) -> None:
    import numpy as np

    sizes = sorted({(r["height"], r["width"]) for r in rows}, key=lambda s: s[0] * s[1])
    at = {size: (size[0] * size[1]) ** 0.5 for size in sizes}
    for word, colour in colours.items():
        mine = [row for row in rows if row["encoding"] == word]
        lines = list(dict.fromkeys((row["policy"], row["temperature"]) for row in mine))
        score = {
            line: statistics.mean([r["value"] for r in mine if (r["policy"], r["temperature"]) == line])
            for line in lines
        }
        sign = -1 if metric_of(rows).more_is_better else 1
        shown = lines[:1] + sorted(lines[1:], key=lambda line: sign * score[line])[:1]
        for i, (policy, temperature) in enumerate(shown):
            values = [
                [r["value"] for r in mine if (r["policy"], r["temperature"]) == (policy, temperature)
                 and (r["height"], r["width"]) == size]
                for size in sizes
            ]  # fmt: skip
            mean = np.array([np.mean(v) if v else np.nan for v in values])
            spread = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
            x = np.array([at[size] for size in sizes])
            label = word if i == 0 else f"{word} · {policy}" + ("" if temperature == "none" else f" · {temperature}")
            ax.plot(x, mean, "o-" if i == 0 else "--", color=colour, label=label, ms=4, lw=1.8 if i == 0 else 1)
            if spread.any():
                ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
    train = rows[0]["train_height"], rows[0]["train_width"]
    ax.axvline((train[0] * train[1]) ** 0.5, color="0.6", lw=1, ls=":")
    ax.set_xscale("log", base=2)
    ax.set_xticks([at[size] for size in sizes], [spell(size) for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel(f"{metric_of(rows).scale}; dotted: training")
    if not metric_of(rows).more_is_better:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)
