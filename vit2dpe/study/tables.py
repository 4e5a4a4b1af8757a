"""Rows of a study as a table of Markdown, and the order of its encodings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from .rows import SCRATCH, Row

Column = TypeVar("Column", bound=Hashable)


class Metric(NamedTuple):
    """Display metadata of a metric.

    Args:
        study: title of a study of it.
        name, unit: in a sentence, and on an axis.
        over: the variable it is drawn over; scale: the label of that axis.
        more_is_better: whether the largest value is the best.
    """

    study: str
    name: str
    unit: str
    over: str
    scale: str
    more_is_better: bool = True


METRICS = {
    "top1": Metric("Resolution study", "top-1 in percent", "top-1 [%]", "image size", "image size [pixels]"),
    "agreement": Metric(
        "Exchange of an encoding",
        "agreement with the old model in percent",
        "agreement [%]",
        "image size",
        "image size [pixels]",
    ),
    "similarity": Metric(
        "Exchange of an encoding",
        "similarity to the old model in percent",
        "cosine [%]",
        "image size",
        "image size [pixels]",
    ),
    "perplexity": Metric("Length study", "perplexity", "perplexity", "length", "length [tokens]", more_is_better=False),
    "exact": Metric("Sequence study", "sequences right in percent", "sequences right [%]", "length", "length [tokens]"),
}


MAJORITY = "majority class [%]"  # in env.json: how often naming the most frequent class of the test images is right
AT_HAND = "weights at hand"  # in env.json: a run that a study from scratch could have started from
START = "start"  # in env.json: of a study from weights, what they are
FIT = "fit"  # in env.json: how photos of differing sizes were brought to one, crop, pad or squash


def metric_of(rows: Sequence[Row]) -> Metric:
    return METRICS[rows[0].metric if rows else "top1"]


def default_rows(rows: Iterable[Row]) -> list[Row]:
    """Those of each encoding's first policy, without temperature."""
    rows = list(rows)
    first: dict[str, tuple[str, str]] = {}
    for row in rows:
        first.setdefault(row.label, (row.policy, row.temperature))
    return [row for row in rows if (row.policy, row.temperature) == first[row.label]]


def best(rows: Sequence[Row]) -> list[str]:
    """Encodings, the best mean accuracy over all default rows first; a control is none of them."""
    score: dict[str, list[float]] = {}
    for row in default_rows(row for row in rows if row.start != SCRATCH):
        score.setdefault(row.subject, []).append(row.value)
    sign = -1 if metric_of(rows).more_is_better else 1
    return sorted(score, key=lambda encoding: sign * statistics.mean(score[encoding]))


def spell(size: tuple[float, float]) -> str:
    """ "32" of a square, "32x48" of height x width, the length of a sequence."""
    height, width = (int(side) for side in size)
    return str(width) if height in (width, 1) else f"{height}x{width}"


def over_depth(rows: Sequence[Row]) -> bool:
    """Whether these are answers to sequences of one length, which are shown over the number of blocks."""
    return bool(rows) and rows[0].metric == "exact" and len({row.width for row in rows}) == 1


def depths_of(rows: Iterable[Row]) -> list[int]:
    """The numbers of blocks that these rows compare, in order; none where they are of one depth."""
    depths = sorted({row.blocks for row in rows if row.blocks is not None})
    return depths if len(depths) > 1 else []


def size_of_training(rows: Sequence[Row]) -> tuple[float, float]:
    """The size of training, or the measured one that is nearest to it."""
    height, width = rows[0].train_size
    return min((row.size for row in rows), key=lambda size: (abs(size[0] * size[1] - height * width), size))


def table(rows: Sequence[Row], spread: Callable[[list[float]], float] = statistics.stdev) -> str:
    """Markdown: the metric over size, a line for each mode, encoding and policy; mean ± `spread` of several seeds,
    "-" where nothing was measured: a table that `subtable` trained has no larger size of its own.

    Where a study has several depths a table of depth and encoding at the training size stands before it. Sequences of
    one length: over depth alone, a line for each encoding and policy.
    """
    if over_depth(rows):
        modes = list(dict.fromkeys(row.mode for row in rows))
        lines = _pivot(rows, lambda row: (row.subject, row.policy), lambda row: row.mode, modes, spread)
        caption = f"{metric_of(rows).name}, sequences of {int(rows[0].width)}"
        return "\n".join([caption, "", *_markdown(["encoding", "policy"], modes, lines)])
    sizes = sorted({row.size for row in rows}, key=lambda size: (size[0] * size[1], size))
    train, metric = {row.train_size for row in rows}, metric_of(rows)
    lines = _pivot(
        rows, lambda row: (row.panel, row.label, row.policy, row.temperature), lambda row: row.size, sizes, spread
    )
    lines.sort(key=lambda line: not line[0].startswith("scale"))
    heads = [f"**{spell(size)}**" if size in train else spell(size) for size in sizes]
    caption = f"{metric.name} over {metric.over}; that of training in bold"
    over_size = [caption, "", *_markdown(["mode", "encoding", "policy", "temperature"], heads, lines)]
    return "\n".join([*_over_depth(rows, spread), *over_size])


def _over_depth(rows: Sequence[Row], spread: Callable[[list[float]], float]) -> list[str]:
    """The table of depth and encoding, each with its first policy; nothing where there is one depth."""
    depths, metric = depths_of(rows), metric_of(rows)
    if not depths:
        return []
    size = size_of_training(rows)
    shown = [row for row in default_rows(rows) if row.size == size and row.blocks is not None]
    lines = _pivot(shown, lambda row: (row.part, row.subject, row.policy), lambda row: row.blocks or 0, depths, spread)
    lines.sort(key=lambda line: line[0] != "scale")
    caption = f"{metric.name} over depth, at {metric.over} {spell(size)}"
    words, heads = ["mode", "encoding", "policy"], [f"depth {depth}" for depth in depths]
    if not any(line[0] for line in lines):  # sequences have no mode
        words, lines = words[1:], [line[1:] for line in lines]
    return [caption, "", *_markdown(words, heads, lines), ""]


def _pivot(
    rows: Sequence[Row],
    key: Callable[[Row], tuple[str, ...]],
    column: Callable[[Row], Column],
    columns: Sequence[Column],
    spread: Callable[[list[float]], float],
) -> list[list[str]]:
    """A line for each key: its words, then the value at each of the columns, over seeds."""
    values: dict[tuple[str, ...], dict[Column, list[float]]] = {}
    for row in rows:
        values.setdefault(key(row), {}).setdefault(column(row), []).append(row.value)
    return [[*words, *(_mean(at.get(one, []), spread) for one in columns)] for words, at in values.items()]


def _markdown(words: list[str], numbers: list[str], lines: list[list[str]]) -> list[str]:
    rule = "|" + "---|" * len(words) + "---:|" * len(numbers)
    heads, *rest = ("| " + " | ".join(line) + " |" for line in ([*words, *numbers], *lines))
    return [heads, rule, *rest]


def _mean(values: list[float], spread: Callable[[list[float]], float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {spread(values):.1f}" if len(values) > 1 else mean
