"""Rows of a study as heat-maps: the metric of each depth and encoding, and of each size and encoding."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .rows import Row
from .tables import default_rows, depths_of, metric_of, size_of_training, spell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure


class Cells(NamedTuple):
    """A heat-map: a mean over seeds for each encoding (rows) and each column; NaN where nothing was measured."""

    title: str
    over: str  # label of the columns
    columns: list[str]
    encodings: list[str]
    values: list[list[float]]


def cells(rows: Sequence[Row]) -> list[list[Cells]]:
    """A list for each mode: depth x encoding at the training size, then size x encoding at each depth.

    Each encoding has its first policy, without temperature. What would have one column alone is left out.
    """
    metric, depths, at = metric_of(rows), depths_of(rows), size_of_training(rows)
    rows = default_rows(rows)
    sizes = sorted({row.size for row in rows}, key=lambda size: (size[0] * size[1], size))
    spelled = [spell(size) for size in sizes]
    found: list[list[Cells]] = []
    for part in dict.fromkeys(row.part for row in rows):
        of_part, line = [row for row in rows if row.part == part], list[Cells]()
        where = f"{part}, " if part else ""
        if depths:
            shown = [row for row in of_part if row.size == at]
            title = f"{where}{metric.over} {spell(at)}"
            line.append(_cells(title, "depth [blocks]", list(map(str, depths)), shown, lambda row: str(row.blocks)))
        at_each: list[int | None] = [*depths] or [None]
        for depth in at_each if len(sizes) > 1 else []:
            shown = [row for row in of_part if depth is None or row.blocks == depth]
            title = f"{where}depth {depth}" if depth else part
            line.append(_cells(title, metric.scale, spelled, shown, lambda row: spell(row.size)))
        found.append(line)
    return [line for line in found if line]


def _cells(title: str, over: str, columns: list[str], rows: Sequence[Row], column: Callable[[Row], Hashable]) -> Cells:
    encodings = list(dict.fromkeys(row.subject for row in rows))
    values: dict[tuple[str, Hashable], list[float]] = {}
    for row in rows:
        values.setdefault((row.subject, column(row)), []).append(row.value)
    mean = [[statistics.mean(values.get((e, c), [math.nan])) for c in columns] for e in encodings]
    return Cells(title, over, columns, encodings, mean)


def draw(rows: Sequence[Row]) -> Figure:
    """A figure of the heat-maps of `cells`, a row a mode, on one scale; bright is better."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    metric, every = metric_of(rows), cells(rows)
    scale = _scale([v for line in every for one in line for row in one.values for v in row], metric.more_is_better)
    colours = "viridis" if metric.more_is_better else "viridis_r"
    widths = [max(0.62 * len(one.columns), 1.9) for one in max(every, key=len)]
    high = 0.3 * max(len(one.encodings) for line in every for one in line) + 1.0
    longest = max(len(encoding) for line in every for one in line for encoding in one.encodings)
    size = (sum(widths) + 0.3 * len(widths) + 0.085 * longest + 1.2, high * len(every) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(every), len(widths), squeeze=False, width_ratios=widths)
    for line, panels in zip(every, axes, strict=True):
        for ax in panels[len(line) :]:
            ax.axis("off")
        for i, (one, ax) in enumerate(zip(line, panels, strict=False)):
            _paint(ax, one, scale, colours, named=i == 0)
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=axes, label=metric.unit, fraction=0.04, aspect=30)
    bar.ax.minorticks_off()
    figure.suptitle(f"{metric.name}: each depth, size and encoding", fontsize=11)
    return figure


def _scale(values: Sequence[float], linear: bool) -> Normalize:
    """From the least to the largest finite value; logarithmic for a perplexity."""
    from matplotlib.colors import LogNorm, Normalize

    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    return Normalize(low, high if high > low else low + 1.0) if linear else LogNorm(low, max(high, 1.01 * low))


def _paint(ax: Axes, one: Cells, scale: Normalize, colours: str, named: bool) -> None:
    import matplotlib

    ax.set_facecolor("0.85")  # of cells that were not measured
    ax.imshow(one.values, norm=scale, cmap=colours, aspect="auto")
    palette = matplotlib.colormaps[colours]
    for y, row in enumerate(one.values):
        for x, value in enumerate(row):
            measured = math.isfinite(value)
            red, green, blue, _ = palette(scale(value)) if measured else (1.0, 1.0, 1.0, 1.0)
            ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            ax.text(x, y, f"{value:.1f}" if measured else "–", ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(range(len(one.columns)), one.columns, fontsize=8)
    ax.set_yticks(range(len(one.encodings)), one.encodings if named else [], fontsize=8)
    for label in ax.get_yticklabels():
        label.set_parse_math(False)  # names of other people's models
    ax.tick_params(length=0)
    ax.set_title(one.title, fontsize=9)
    ax.set_xlabel(one.over, fontsize=9)
