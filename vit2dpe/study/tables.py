"""What a study's rows say, as numbers and as a table of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

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
