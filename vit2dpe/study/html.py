"""A study's report as one HTML file: charts that are read by pointing, tables, and where the numbers come from.

Rows of `results.csv` are averaged over seeds; nothing else is computed. The page is `report.html` beside this file, a
jinja2 template that escapes whatever it is filled with; the data of its charts are JSON inside it, and it fetches
nothing.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from ..errors import DataError
from ..files import write_atomically
from ..spec import Plain
from .answers import ANSWERS, Right, read_answers
from .intervals import of_mean
from .rows import Row, read_rows
from .tables import METRICS, metric_of, spell
from .verdict import Verdict, verdict

Facts = dict[str, Plain]  # the content of env.json


class Measure(NamedTuple):
    """Display metadata of a measure; `better`: the sign of a better difference."""

    title: str
    note: str
    unit: str
    digits: int
    better: int


MEASURES = {
    "top1": Measure("Accuracy", "top-1 in percent", "%", 1, 1),
    "loss": Measure("Loss", "cross-entropy in nats, lower is better", "", 3, -1),
    "perplexity": Measure("Perplexity", "exp(loss) of a token, lower is better", "", 2, -1),
    "exact": Measure("Sequences right", "in percent, without a single error", "%", 1, 1),
    "entropy": Measure("Attention entropy", "nats, mean over heads and blocks: 0 is one key", "", 2, 1),
    "distance": Measure("Attention distance", "mean distance of attention in patches", "", 2, 1),
}


class Study(NamedTuple):
    """One run: its name, its rows (as in `results.csv`), its record (as in `env.json`), what each row has right."""

    name: str
    rows: list[Row]
    about: Facts
    answers: Sequence[Right] | None = None

    @property
    def verdict(self) -> Verdict | None:
        return verdict(self.rows, self.answers, self.about)

    @property
    def seeds(self) -> str:
        seeds = {int(row.seed) for row in self.rows if row.seed is not None}
        return ", ".join(map(str, sorted(seeds))) or "unknown"

    @property
    def summary(self) -> str:
        facts = (self.about.get("data"), f"seeds {self.seeds}", self.about.get("hardware"))
        return "; ".join(str(fact) for fact in facts if fact)


class Statistic(NamedTuple):
    """Mean and standard deviation over n seeds, and the ends of an interval of 95%, where one can be given."""

    mean: float
    deviation: float = 0.0
    n: int = 1
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], images: float | None, percent: bool) -> Statistic:
        """Of one value a seed; `images`: over how many each share in percent was counted."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.mean(values), deviation, len(values), *(of_mean(values, images, percent) or (None, None)))


class Point(NamedTuple):
    """The measures at a size; x: the size as one number (`_side`), or its ratio to the training size."""

    x: float
    label: str
    values: dict[str, Statistic]


@dataclass
class Series:
    """A line of the charts; `train`: the side of training images, `first`: whether it is the default policy.

    `mode` is that of a chart, in which a study of several depths names the depth; `part` is without.
    """

    name: str
    study: int
    policy: str
    mode: str
    part: str
    depth: int | None
    first: bool
    train: float
    points: list[Point]

    def json(self) -> dict[str, Plain]:
        points = [dict(x=point.x, label=point.label, **point.values) for point in self.points]
        return vars(self) | dict(points=points)


class Table(NamedTuple):
    """A sortable table: columns of text, then of numbers that `form` formats; a row has an entry for each of them."""

    text: list[str]
    numbers: list[str]
    rows: list[tuple[list[str], list[Statistic | None]]]
    form: str


def read_study(run: str | Path) -> Study:
    """The study in a folder.

    Raises:
        DataError: for a folder without a readable `results.csv`.
    """
    folder = Path(run)
    path = folder / "results.csv"
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path} is no study's results: it has no rows")
    try:
        about = json.loads((folder / "env.json").read_text()) if (folder / "env.json").is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'env.json'} cannot be read: {error}") from None
    return Study(folder.resolve().name, rows, about, read_answers(folder / ANSWERS, path, len(rows)))


def merge(runs: Sequence[str | Path], out: str | Path = "report.html") -> Path:
    """`vit2dpe report RUN...`: one page for several studies; prints the verdict of each."""
    if not runs:
        raise DataError("name at least one folder with the results.csv of a study")
    path, studies = Path(out), [read_study(run) for run in runs]
    for name, study in zip([_name(study, studies) for study in studies], studies, strict=True):
        if found := study.verdict:
            print(f"{name}\n\n{found.text()}\n" if len(studies) > 1 else f"{found.text()}\n")
    write_atomically(path, encoded(page(studies)))
    return path


def encoded(text: str) -> bytes:
    """UTF-8; a byte of a file's name that is none is written as an escape."""
    return text.encode("utf-8", "backslashreplace")


def page(studies: Sequence[Study]) -> str:
    """The page of these studies; with several, an encoding keeps its colour and a study has its own dashes."""
    series = [one for i, study in enumerate(studies) for one in _series(study, i)]
    names, metric = [_name(study, studies) for study in studies], metric_of(studies[0].rows)
    relative = len({one.train for one in series}) > 1
    for one in series if relative else ():  # studies of different sizes meet at multiples of their own
        xs = [round(point.x / one.train, 6) for point in one.points]
        one.points = [Point(x, f"{x:.3g}x", point.values) for x, point in zip(xs, one.points, strict=True)]
    measures = [key for key in MEASURES if any(key in point.values for one in series for point in one.points)]
    data = dict(
        series=[one.json() for one in series],
        studies=names,
        names=list(dict.fromkeys(one.name for one in series)),
        modes=sorted(dict.fromkeys(one.mode for one in series), key=lambda mode: not mode.startswith("scale")),
        measures=[dict(key=key, **MEASURES[key]._asdict()) for key in measures],
        train=[1.0] if relative else sorted({one.train for one in series}),
        axis="size / size in training" if relative else metric.scale,
    )
    return _template().render(
        title=metric.study if len(studies) == 1 else f"{len(studies)} studies",
        studies=dict(zip(names, studies, strict=True)),
        verdicts={name: found for name, study in zip(names, studies, strict=True) if (found := study.verdict)},
        losses=_losses(series, names, relative),
        table=_all_numbers(series, names, measures),
        data=data,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"pretty": partial(json.dumps, indent=1), "whole": _whole}
    environment.policies["json.dumps_kwargs"] = {}  # keys in our order
    return environment.from_string(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))


def _whole(sentence: str) -> Markup:
    """Intervals stay on one line."""
    return Markup(re.sub(r"\[[^\[\]]*\]", r'<span class="whole">\g<0></span>', str(escape(sentence))))


def _series(study: Study, index: int) -> Iterator[Series]:
    """A line for each encoding, policy, temperature and mode: mean, deviation and count over seeds at each size."""
    Line = tuple[str, str, str, str, int | None, tuple[float, float]]
    lines: dict[Line, dict[tuple[float, float], dict[str, list[float]]]] = {}
    counted: dict[tuple[Line, tuple[float, float]], tuple[str, float | None]] = {}
    first: dict[str, str] = {}
    for row in study.rows:
        policy = row.policy + ("" if row.temperature == "none" else f" · {row.temperature}")
        first.setdefault(row.label, policy)
        line = (row.label, policy, row.panel, row.part, row.blocks, row.train_size)
        sizes = lines.setdefault(line, {})
        at_size = sizes.setdefault(row.size, {})
        if row.metric in METRICS:
            counted.setdefault((line, row.size), (row.metric, row.n))
        measured = {row.metric: row.value} | (dict(top1=row.top1, loss=row.loss) if row.metric in METRICS else {})
        for key, value in measured.items():
            if key in MEASURES and value is not None and math.isfinite(value):
                at_size.setdefault(key, []).append(value)
    for line, sizes in lines.items():
        name, policy, mode, part, depth, train = line
        points = []
        for size, at_size in sorted(sizes.items(), key=lambda item: math.prod(item[0])):
            metric, n = counted.get((line, size), ("", None))
            values = {
                key: Statistic.of(v, n if key == metric else None, percent=MEASURES[key].unit == "%")
                for key, v in at_size.items()
            }
            points.append(Point(_side(size), spell(size), values))
        yield Series(name, index, policy, mode, part, depth, policy == first[name], _side(train), points)


def _losses(series: Sequence[Series], names: Sequence[str], relative: bool) -> Table:
    """Change of top-1 from the training size to each other one: an encoding's default policy, then its best other one.

    Where the training size was not measured, from the measured one that is nearest to it.
    """
    sides = {_ratio(point, one, relative): point.label for one in series for point in one.points if point.x}
    base = min(sides, key=lambda ratio: (abs(math.log(ratio)), ratio)) if sides else 1.0
    used = sorted(ratio for ratio in sides if ratio != base)

    def change(one: Series) -> list[Statistic | None]:
        at = {_ratio(point, one, relative): point.values["top1"].mean for point in one.points if "top1" in point.values}
        return [Statistic(at[ratio] - at[base]) if ratio in at and base in at else None for ratio in used]

    groups: dict[tuple[int, str, str], list[Series]] = {}
    for one in series:
        groups.setdefault((one.study, one.mode, one.name), []).append(one)
    rows = []
    for (study, mode, name), group in sorted(
        groups.items(), key=lambda item: (item[0][0], not item[0][1].startswith("scale"))
    ):
        changes = {one.policy: change(one) for one in group}
        default = next((one.policy for one in group if one.first), group[0].policy)
        best = max(changes, key=lambda policy: sum(value.mean for value in changes[policy] if value))
        for policy in dict.fromkeys([default, best]):
            if any(value is not None for value in changes[policy]):
                rows.append(([names[study], mode, name, policy], changes[policy]))
    heads = [sides[ratio] if relative else f"{sides[ratio]} ({ratio:.3g}x)" for ratio in used]
    return _one_study(["study", "mode", "encoding", "policy"], heads, rows, "{:+.1f}")


def _ratio(point: Point, one: Series, relative: bool) -> float:
    """Its side over that of training."""
    return point.x if relative else round(point.x / one.train, 6)


def _all_numbers(series: Sequence[Series], names: Sequence[str], measures: Sequence[str]) -> Table:
    rows = [
        ([names[one.study], one.mode, one.name, one.policy, point.label], [point.values.get(key) for key in measures])
        for one in series
        for point in one.points
    ]
    heads = [MEASURES[key].title.lower() for key in measures]
    return _one_study(["study", "mode", "encoding", "policy", "size"], heads, rows, "{:.4g}")


def _one_study(
    text: list[str], numbers: list[str], rows: list[tuple[list[str], list[Statistic | None]]], form: str
) -> Table:
    """The table, without its first column, the name of the study, where there is one study."""
    if len({words[0] for words, _ in rows}) == 1:
        text, rows = text[1:], [(words[1:], values) for words, values in rows]
    return Table(text, numbers, rows, form)


def _name(study: Study, studies: Sequence[Study]) -> str:
    """Its name, numbered where several share it."""
    same = [other for other in studies if other.name == study.name]
    return study.name if len(same) == 1 else f"{study.name} {[other is study for other in same].index(True) + 1}"


def _side(size: tuple[float, float]) -> float:
    """√(height x width) of an image, the length of a sequence (1, length)."""
    height, width = size
    return width if height == 1 else round(math.sqrt(height * width), 6)
