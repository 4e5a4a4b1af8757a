"""The study's report as one HTML file: charts that are read by pointing, tables, and where the numbers come from.

Nothing is computed anew: rows of `results.csv` are averaged over seeds and put into a page that fetches nothing. The
page itself is `report.html` beside this file; its data are JSON inside it.
"""

from __future__ import annotations

import csv
import html
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..files import write_atomically

Row = dict[str, Any]

MULTIPLES = (1.5, 2.0, 3.0, 4.0)
MEASURES: dict[str, dict[str, Any]] = {
    "top1": dict(title="Accuracy", note="top-1 in percent over image size", unit="%", digits=1, better=1),
    "loss": dict(title="Loss", note="cross-entropy in nats, lower is better", unit="", digits=3, better=-1),
    "entropy": dict(
        title="Attention entropy", note="nats, mean over heads and blocks: 0 is one key", unit="", digits=2, better=1
    ),
    "distance": dict(
        title="Attention distance", note="mean distance of attention in patches", unit="", digits=2, better=1
    ),
}


class Study(NamedTuple):
    """One run: its name, its rows (as in `results.csv`), and its record (as in `env.json`)."""

    name: str
    rows: list[Row]
    about: dict[str, Any]


def read_study(run: str | Path) -> Study:
    """The study in a folder.

    Raises:
        DataError: for a folder without a readable `results.csv`.
    """
    folder = Path(run)
    path = folder / "results.csv"
    try:
        with path.open(newline="") as file:
            rows = [_numbers(row) for row in csv.DictReader(file)]
        about = json.loads((folder / "env.json").read_text()) if (folder / "env.json").is_file() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a study's results: {error}") from None
    missing = {"encoding", "policy", "mode", "height", "width", "top1"} - set(rows[0] if rows else ())
    if missing:
        raise DataError(f"{path} is no study's results: it has no {'rows' if not rows else ', '.join(sorted(missing))}")
    return Study(folder.resolve().name, rows, about)


def merge(runs: Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """`vit2dpe report RUN...`: one page for several studies."""
    if not runs:
        raise DataError("name at least one folder with the results.csv of a study")
    path = Path(out)
    write_atomically(path, page([read_study(run) for run in runs]).encode())
    return path


def page(studies: Sequence[Study]) -> str:
    """The page of these studies; with several, an encoding keeps its colour and a study has its own dashes."""
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    series = [one for i, study in enumerate(studies) for one in _series(study, i)]
    names = [_name(study, studies) for study in studies]
    relative = len({one["train"] for one in series}) > 1
    for one in series:
        for point in one["points"]:
            if relative:  # studies of different sizes meet at multiples of their own
                point["x"] = round(point["x"] / one["train"], 6)
                point["label"] = f"{point['x']:.3g}x"
    measures = [key for key in MEASURES if any(key in point for one in series for point in one["points"])]
    modes = list(dict.fromkeys(one["mode"] for one in series))
    data = dict(
        series=series,
        studies=names,
        names=list(dict.fromkeys(one["name"] for one in series)),
        modes=sorted(modes, key=lambda mode: mode != "scale"),
        measures=[dict(key=key, **MEASURES[key]) for key in measures],
        train=[1.0] if relative else sorted({one["train"] for one in series}),
        axis="side of the image / side in training" if relative else "image size in pixels",
    )
    parts = dict(
        title="Resolution study" if len(studies) == 1 else f"{len(studies)} resolution studies",
        head="".join(_head(study, name) for study, name in zip(studies, names, strict=True)),
        losses=_losses(series, names, relative),
        table=_table(series, names, measures),
        origin="".join(_origin(study, name) for study, name in zip(studies, names, strict=True)),
        data=json.dumps(data).replace("<", "\\u003c"),
    )
    parts["title"] = html.escape(parts["title"])
    for key, value in parts.items():
        template = template.replace("{{%s}}" % key, value)  # noqa: UP031 - braces mean something to f-strings
    return template


def _series(study: Study, index: int) -> Iterable[dict[str, Any]]:
    """A line for each encoding, policy, temperature and mode: mean, deviation and count over seeds at each size."""
    cells: dict[tuple, dict[tuple, dict[str, list[float]]]] = {}
    first: dict[str, str] = {}
    for row in study.rows:
        policy = row["policy"] + ("" if row.get("temperature", "none") == "none" else f" · {row['temperature']}")
        first.setdefault(row["encoding"], policy)
        train = (row.get("train_height", row["height"]), row.get("train_width", row["width"]))
        at = cells.setdefault((row["encoding"], policy, row["mode"], train), {}).setdefault(
            (row["height"], row["width"]), {}
        )
        metric = row.get("metric", "top1")
        found = (
            {key: row[key] for key in MEASURES if isinstance(row.get(key), (int, float))} if metric == "top1" else {}
        )
        if metric in MEASURES and metric != "top1":
            found[metric] = row["value"]
        for key, value in found.items():
            if math.isfinite(value):
                at.setdefault(key, []).append(value)
    for (word, policy, mode, train), sizes in cells.items():
        points = []
        for (h, w), measured in sorted(sizes.items(), key=lambda item: math.prod(item[0])):
            values = {
                key: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v)]
                for key, v in measured.items()
            }
            points.append(dict(x=_side(h, w), label=_spell(h, w), **values))
        yield dict(
            name=word,
            study=index,
            policy=policy,
            mode=mode,
            first=policy == first[word],
            train=_side(*train),
            points=points,
        )


def _losses(series: list[dict[str, Any]], names: list[str], relative: bool) -> str:
    """What each encoding loses at multiples of the training side: its default policy, then its best other one."""

    def change(one: dict[str, Any]) -> list[float | None]:
        train = 1.0 if relative else one["train"]
        at = {round(p["x"] / train, 2): p["top1"][0] for p in one["points"] if "top1" in p}
        base = at.get(1.0)
        return [None if base is None or m not in at else at[m] - base for m in MULTIPLES]

    rows = []
    groups = dict.fromkeys((one["study"], one["mode"], one["name"]) for one in series)
    for group in sorted(groups, key=lambda key: (key[0], key[1] != "scale")):
        mine = [one for one in series if (one["study"], one["mode"], one["name"]) == group]
        changes = {one["policy"]: change(one) for one in mine}
        default = next((one["policy"] for one in mine if one["first"]), mine[0]["policy"])
        score = {p: sum(v for v in values if v is not None) for p, values in changes.items()}
        best = max(score, key=lambda p: score[p])
        for policy in dict.fromkeys([default, best]):
            if any(v is not None for v in changes[policy]):
                rows.append([names[group[0]], *group[1:], policy, *changes[policy]])
    used = [i for i in range(len(MULTIPLES)) if any(row[4 + i] is not None for row in rows)]
    heads = ["study", "mode", "encoding", "policy", *(f"{MULTIPLES[i]:g}x" for i in used)]
    return _html_table(heads, [[*row[:4], *(row[4 + i] for i in used)] for row in rows], 4, "{:+.1f}")


def _table(series: list[dict[str, Any]], names: list[str], measures: list[str]) -> str:
    rows = [
        [names[one["study"]], one["mode"], one["name"], one["policy"], point["label"], *map(point.get, measures)]
        for one in series
        for point in one["points"]
    ]
    heads = ["study", "mode", "encoding", "policy", "size", *(MEASURES[key]["title"].lower() for key in measures)]
    return _html_table(heads, rows, 5, "{:.4g}")


def _html_table(heads: list[str], rows: list[list[Any]], words: int, form: str) -> str:
    """A sortable table whose first `words` columns are words; a number, or (mean, deviation, count)."""

    if len({row[0] for row in rows}) == 1 and heads[0] == "study":  # one study needs no column for its name
        heads, rows, words = heads[1:], [row[1:] for row in rows], words - 1

    def cell(value: Any, i: int) -> str:
        if i < words:
            return f'<td class="word">{html.escape(str(value))}</td>'
        if value is None:
            return "<td></td>"
        mean, deviation, n = value if isinstance(value, list) else (value, 0.0, 1)
        spread = f" ± {deviation:.2g}" if n > 1 else ""
        return f'<td data-value="{mean:.6g}">{form.format(mean)}{spread}</td>'

    head = "".join(
        f'<th scope="col"{" class=word" if i < words else ""}><button type="button">{html.escape(h)}</button></th>'
        for i, h in enumerate(heads)
    )
    body = "\n".join("<tr>" + "".join(cell(v, i) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _head(study: Study, name: str) -> str:
    about = study.about
    facts = [about.get("data"), f"seeds {_seeds(study)}", about.get("hardware")]
    text = "; ".join(str(fact) for fact in facts if fact)
    return f'<p class="soft"><b>{html.escape(name)}</b> {html.escape(text)}</p>'


def _origin(study: Study, name: str) -> str:
    """Command, versions, hardware, seeds; the settings fold out."""
    about = {"seeds": _seeds(study)} | (study.about or {"note": "this run kept no env.json"})
    settings = about.pop("config", None)
    command = f"<pre>{html.escape(str(about.pop('command')))}</pre>" if about.get("command") else ""
    facts = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in about.items())
    more = f"<details><summary>settings</summary><pre>{html.escape(json.dumps(settings, indent=1))}</pre></details>"
    return f"<h3>{html.escape(name)}</h3>{command}<dl>{facts}</dl>{more if settings else ''}"


def _seeds(study: Study) -> str:
    found = {int(row["seed"]) for row in study.rows if isinstance(row.get("seed"), int | float)}
    return ", ".join(map(str, sorted(found))) or "unknown"


def _name(study: Study, studies: Sequence[Study]) -> str:
    """Its name, numbered where several share it."""
    same = [other for other in studies if other.name == study.name]
    return study.name if len(same) == 1 else f"{study.name} {[other is study for other in same].index(True) + 1}"


def _numbers(row: dict[str, str]) -> Row:
    words = ("encoding", "policy", "temperature", "mode", "metric")
    return {k: v if k in words else (float(v) if v not in ("", None) else None) for k, v in row.items()}


def _side(height: float, width: float) -> float:
    return round(math.sqrt(height * width), 6)


def _spell(height: float, width: float) -> str:
    return str(int(height)) if height == width else f"{int(height)}x{int(width)}"
