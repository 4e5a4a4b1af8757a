"""Rows of a study as a picture: the metric over size, or over depth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .intervals import of_mean
from .rows import Row
from .tables import default_rows, depths_of, metric_of, over_depth, spell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (-3, 103)  # the axis of every share in percent: a zoom makes noise look like a difference
MODES = {"scale": ": the same picture with more pixels", "canvas": ": more content at the scale of training"}


def draw(rows: Sequence[Row], curves: Mapping[str, list[tuple[int, float]]] | None = None, status: str = "") -> Figure:
    """The metric over size, a panel a mode, a colour an encoding: solid its default policy, dashed its best other one.

    Bands are intervals of 95% of each value by itself: over seeds, or over images of one seed.
    A study of several depths has a row of panels for each of them. Sequences of one length: over
    depth. Before a trial is finished the panel shows the training loss of `curves`.
    """
    from matplotlib.figure import Figure

    metric, depths = metric_of(rows), over_depth(rows)
    status = f" ({status})" if status else ""
    modes = [""] if depths or not rows else list(dict.fromkeys(row.panel for row in rows))
    across = len(dict.fromkeys(row.part for row in rows)) if depths_of(rows) and not depths else len(modes)
    down = math.ceil(len(modes) / across)
    size = (6.2, 4.2) if depths else (6.2 * across + 1.6, 5 if down == 1 else 3.6 * down + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharey=down > 1).flat
    if depths:
        _depth_panel(panels[0], rows)
    elif rows:
        colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.label for row in rows))}
        for panel in panels[len(modes) :]:
            panel.axis("off")
        for panel, mode in zip(panels, modes, strict=False):
            shown = [row for row in rows if row.panel == mode]
            _panel(panel, shown, colours)
            panel.set_title(mode + MODES.get(shown[0].part, ""), fontsize=10)
        for panel in panels[::across]:
            panel.set_ylabel(metric.unit)
        handles = panels[0].get_legend_handles_labels()
        legend = figure.legend(*handles, loc="outside right upper", fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names of other people's models
    else:
        for name, curve in (curves or {}).items():
            panels[0].plot(*zip(*curve, strict=True), label=name)
        panels[0].set(xlabel="step", ylabel="training loss", title="no encoding is finished yet")
        panels[0].legend()
    figure.suptitle(f"{metric.name} over {'depth' if depths else metric.over}{status}", fontsize=11)
    return figure


def _depth_panel(panel: Axes, rows: Sequence[Row]) -> None:
    shown = default_rows(rows)
    modes = list(dict.fromkeys(row.mode for row in rows))
    for i, encoding in enumerate(dict.fromkeys(row.subject for row in rows)):
        x = [at + 0.03 * i for at in range(len(modes))]  # so that equal lines can be told apart
        values = [[row.value for row in shown if (row.subject, row.mode) == (encoding, mode)] for mode in modes]
        panel.plot(x, [statistics.mean(v) if v else math.nan for v in values], "o-", label=encoding, ms=4)
    panel.set_xticks(range(len(modes)), [mode.removeprefix("depth ") for mode in modes])
    panel.set(xlabel="depth [blocks]", ylabel=metric_of(rows).unit, ylim=SHARES)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8, frameon=False)


def _panel(panel: Axes, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    metric = metric_of(rows)
    side = {size: math.sqrt(size[0] * size[1]) for size in {row.size for row in rows}}
    sizes = sorted(side, key=lambda size: (side[size], size))
    x, images = [side[size] for size in sizes], {row.size: row.n for row in rows}
    for encoding, colour in colours.items():
        lines: dict[tuple[str, str], dict[tuple[float, float], list[float]]] = {}  # policy and temperature -> size
        for row in rows:
            if row.label == encoding:
                lines.setdefault((row.policy, row.temperature), {}).setdefault(row.size, []).append(row.value)
        sign = -1 if metric.more_is_better else 1
        score = {
            line: sign * statistics.mean(v for at in values.values() for v in at) for line, values in lines.items()
        }
        first, others = list(lines)[:1], list(lines)[1:]
        for line in first + sorted(others, key=lambda line: score[line])[:1]:
            values = [lines[line].get(size, []) for size in sizes]
            mean = [statistics.mean(v) if v else math.nan for v in values]
            bands = [
                of_mean(v, images[size], metric.more_is_better) if v else None
                for v, size in zip(values, sizes, strict=True)
            ]
            default = line in first
            label = encoding if default else " · ".join([encoding, *(word for word in line if word != "none")])
            panel.plot(x, mean, "o-" if default else "--", color=colour, label=label, ms=4, lw=1.8 if default else 1)
            if any(bands):
                low, high = ([band[i] if band else m for m, band in zip(mean, bands, strict=True)] for i in (0, 1))
                panel.fill_between(x, low, high, color=colour, alpha=0.12 if default else 0.06, lw=0)
    panel.axvline(math.sqrt(rows[0].train_height * rows[0].train_width), color="0.6", lw=1, ls=":")
    panel.set_xscale("log", base=2)
    panel.set_xticks(x, [spell(size) for size in sizes])
    panel.minorticks_off()
    panel.set_xlabel(f"{metric.scale}; dotted: training; bands: 95%")
    if metric.more_is_better:
        panel.set_ylim(*SHARES)
    else:
        panel.set_yscale("log")
    panel.grid(alpha=0.25)
