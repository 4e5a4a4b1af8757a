"""What weights brought in a study that started from them: their encoding, trained on, against the same from scratch.

At each size the two models have one policy, the first of the encoding. The difference is paired: over the seeds that
both have (t), of one seed over test images, as in `compare`; each size by itself, without correction for the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..spec import Plain
from .answers import Right
from .intervals import Interval, critical_values, over_images, over_seeds
from .rows import SCRATCH, Row
from .tables import default_rows, spell

_Pair = dict[float, tuple[Row, Right]]  # by seed


class Brought(NamedTuple):
    """At a size the mean of both in percent, their difference in points, and its interval, where one can be given."""

    panel: str
    size: tuple[float, float]
    train_size: tuple[float, float]
    encoding: str
    trained_on: float
    scratch: float
    interval: Interval | None
    seeds: int
    n: float | None

    @property
    def by(self) -> float:
        return self.trained_on - self.scratch

    @property
    def at_train(self) -> bool:
        return self.size == self.train_size


def brought(rows: Sequence[Row], answers: Sequence[Right] | None = None) -> list[Brought]:
    """In the order of the rows, sizes from small to large; empty for a study without a control."""
    kept = {id(row) for row in default_rows(rows)}
    places: dict[tuple[str, tuple[float, float]], dict[bool, _Pair]] = {}
    encodings = {row.encoding for row in rows if row.start == SCRATCH}
    for row, right in zip(rows, answers or [None] * len(rows), strict=True):
        if id(row) in kept and row.encoding in encodings and row.metric == "top1" and math.isfinite(row.value):
            pair = places.setdefault((row.panel, row.size), {True: {}, False: {}})
            pair[row.start == SCRATCH][row.seed or 0.0] = row, right
    panels = list(dict.fromkeys(panel for panel, _ in places))
    order = sorted(places, key=lambda at: (panels.index(at[0]), at[1][0] * at[1][1], at[1]))
    return [found for at in order if (found := _compared(at, places[at][False], places[at][True]))]


def _compared(at: tuple[str, tuple[float, float]], ours: _Pair, scratch: _Pair) -> Brought | None:
    seeds = [seed for seed in ours if seed in scratch]
    if not seeds:
        return None
    row, right = ours[seeds[0]]
    differences = [ours[seed][0].value - scratch[seed][0].value for seed in seeds]
    interval, other = None, scratch[seeds[0]][1]
    if len(seeds) > 1:
        interval = over_seeds(differences, least=100 / row.n if row.n else 0.0)
    elif right is not None and other is not None and len(right) == len(other):
        difference = right.long() - other.long()
        interval = over_images(difference, critical_values([difference[None]])[0])
    trained_on, alone = (statistics.mean(one[seed][0].value for seed in seeds) for one in (ours, scratch))
    return Brought(at[0], at[1], row.train_size, row.encoding, trained_on, alone, interval, len(seeds), row.n)


def what_weights_brought(
    rows: Sequence[Row], answers: Sequence[Right] | None, about: Mapping[str, Plain]
) -> tuple[str, list[str]]:
    """What matters, and a sentence for each size with how it is to be read; nothing without a control."""
    found = brought(rows, answers)
    if not found:
        return "", []
    main = next((one for one in found if one.at_train), found[0])
    unclear = main.interval is not None and main.interval.has_zero
    short = f"At {_size(main)} {'it cannot be told whether ' if unclear else ''}the weights brought "
    short += f"{'anything: ' if unclear else ''}{_said(main)}"
    if others := [one for one in found if one is not main and one.panel == main.panel]:
        short += f"; at the other sizes {min(one.by for one in others):+.1f} to {max(one.by for one in others):+.1f}"
    panels = len({one.panel for one in found}) > 1
    each = [
        f"{f'{one.panel}, ' if panels else ''}at {_size(one)} {_said(one)}: {one.encoding} has {one.trained_on:.1f}%, "
        f"from scratch {one.scratch:.1f}%"
        for one in found
    ]
    seeds, n = main.seeds, "" if main.n is None else f" on {int(main.n)} test images"
    what = "t intervals over seeds" if seeds > 1 else "paired bootstrap over test images"
    epochs = _epochs(about)
    how = f"{seeds} seed{'s' if seeds > 1 else ''}{n}; in brackets: 95% of each size by itself, {what}"
    scratch = (
        f"The control has the same schedule, {epochs}which is short for a model from scratch: trained longer it may "
        "come nearer; all its blocks learn at one rate"
    )
    return f"{short}.", [f"{one[0].upper()}{one[1:]}." for one in (*each, how, scratch)]


def _said(one: Brought) -> str:
    interval = "" if one.interval is None else f" [{one.interval.low:.1f} to {one.interval.high:.1f}]"
    return f"{one.by:+.1f} points{interval}"


def _size(one: Brought) -> str:
    return f"{spell(one.size)} (training)" if one.at_train else spell(one.size)


def _epochs(about: Mapping[str, Plain]) -> str:
    config = about.get("config")
    optim = config.get("optim") if isinstance(config, Mapping) else None
    epochs = optim.get("epochs") if isinstance(optim, Mapping) else None
    return f"{epochs} epochs, " if isinstance(epochs, int) else ""
