"""Encodings compared at each size of a study: which is first, and which cannot be told apart from it.

The rule. At a size a competitor is an encoding with each of its policies (where one encoding was studied, each of its
policies). The leader is the one with the best mean. Another one is told apart from it where the interval of the
difference excludes zero, for each of its policies; those that are not make up the leading group. The intervals of a
size hold together with 95%: m comparisons with the best, none among the others. That the leader is chosen by the same
data needs no further correction for the statement that the truly best one is in the leading group (J. C. Hsu,
"Constrained simultaneous confidence intervals for multiple comparisons with the best", Annals of Statistics 1984).
Sizes are not corrected for one another.

- Several seeds: t intervals of the paired differences over the seeds that all of them have, by Bonferroni, since few
  seeds do not show how differences go together.
- One seed: paired bootstrap over test images, simultaneous by the largest deviation (`intervals.critical_values`),
  which is narrower than Bonferroni's where models are right on the same images. It says nothing of other seeds.
- One seed without the answers to each image: no intervals.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .answers import Right
from .intervals import Interval, critical_values, deviation, over_images, over_seeds
from .rows import SCRATCH, Row
from .tables import metric_of

Size = tuple[float, float]


class Line(NamedTuple):
    """A competitor under one policy at one size.

    Args:
        name: that competes; label: with its policy, where it has several results.
        values: of each seed. right: (n,) of the only seed.
    """

    name: str
    label: str
    values: dict[float, float]
    right: Right
    n: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())


class Behind(NamedTuple):
    """A competitor that is not first: its best line, how far it is behind the leader, and whether that can be told."""

    line: Line
    by: float
    interval: Interval | None
    apart: bool


class AtSize(NamedTuple):
    """All competitors at one size.

    Args:
        over: "seeds", "images", or "" where no interval can be given.
        others: the best first.
        comparisons: how many intervals hold together; critical: the factor of those over images.
        deviations: of the paired differences over seeds; differences: (m, n) over images.
    """

    panel: str
    size: Size
    train_size: Size
    over: str
    leader: Line
    others: list[Behind]
    comparisons: int
    critical: float
    deviations: list[float]
    differences: Tensor | None

    @property
    def group(self) -> list[Line]:
        """The leader and those that cannot be told apart from it."""
        return [self.leader, *(other.line for other in self.others if not other.apart)]


def compare(rows: Sequence[Row], answers: Sequence[Right] | None = None) -> list[AtSize]:
    """Every panel and size of a study, in the order of its rows, sizes from small to large; without a control."""
    metric = metric_of(rows)
    places: dict[tuple[str, Size], list[tuple[Row, Right]]] = {}
    for row, right in zip(rows, answers or [None] * len(rows), strict=True):
        if row.start != SCRATCH and row.metric == (rows[0].metric if rows else "") and math.isfinite(row.value):
            places.setdefault((row.panel, row.size), []).append((row, right))
    panels = list(dict.fromkeys(panel for panel, _ in places))
    order = sorted(places, key=lambda at: (panels.index(at[0]), at[1][0] * at[1][1], at[1]))
    several = len({row.subject for row in rows}) > 1
    sign = 1 if metric.more_is_better else -1
    found = [_Place(at, places[at], several, sign) for at in order]
    critical: dict[int, float] = {}
    for n in {one.differences.shape[1] for one in found if one.differences is not None}:
        same = [i for i, one in enumerate(found) if one.differences is not None and one.differences.shape[1] == n]
        values = critical_values([one for i in same if (one := found[i].differences) is not None])
        critical |= dict(zip(same, values, strict=True))
    return [one.compared(critical.get(i, 0.0)) for i, one in enumerate(found)]


class _Place:
    """The lines at one size, the leader first."""

    def __init__(self, at: tuple[str, Size], found: list[tuple[Row, Right]], several: bool, sign: int) -> None:
        (self.panel, self.size), self.sign = at, sign
        self.train_size = found[0][0].train_size
        lines = sorted(_lines(found, several), key=lambda line: -sign * line.mean)
        self.leader = lines[0]
        self.rest = [line for line in lines if line.name != self.leader.name]
        self.seeds = [seed for seed in self.leader.values if all(seed in line.values for line in lines)]
        self.over: str = ""
        self.differences: Tensor | None = None
        if len(self.seeds) > 1:
            self.over = "seeds"
        elif self.leader.right is not None:
            right = [line.right for line in self.rest if line.right is not None]
            if len(right) == len(self.rest) and all(len(each) == len(self.leader.right) for each in right):
                self.over = "images"
                if right:
                    self.differences = self.leader.right.long() - torch.stack(right).long()

    def compared(self, critical: float) -> AtSize:
        pairs = list(zip(self.rest, self._intervals(critical), strict=True))
        apart = {line.name: True for line, _ in pairs}
        first: dict[str, tuple[Line, Interval | None]] = {}
        for line, interval in pairs:
            first.setdefault(line.name, (line, interval))
            apart[line.name] &= interval is not None and interval.low > 0
        others = [
            Behind(line, self.sign * (self.leader.mean - line.mean), interval, apart[name])
            for name, (line, interval) in first.items()
        ]
        deviations = [deviation(paired, self._least) for paired in self._paired()] if self.over == "seeds" else []
        return AtSize(
            self.panel, self.size, self.train_size, self.over, self.leader, others, len(self.rest), critical,
            deviations, self.differences,
        )  # fmt: skip

    def _paired(self) -> Iterator[list[float]]:
        """Of each other line the differences to the leader, one a seed."""
        for line in self.rest:
            yield [self.sign * (self.leader.values[seed] - line.values[seed]) for seed in self.seeds]

    @property
    def _least(self) -> float:
        """A deviation of one image."""
        return 100 / self.leader.n if self.sign > 0 and self.leader.n else 0.0

    def _intervals(self, critical: float) -> Iterator[Interval | None]:
        if self.over == "seeds":
            for paired in self._paired():
                yield over_seeds(paired, m=len(self.rest), least=self._least)
        elif self.differences is not None:
            for difference in self.differences:
                yield over_images(difference, critical)
        else:
            yield from [None] * len(self.rest)


def _lines(found: list[tuple[Row, Right]], several: bool) -> list[Line]:
    """The different results of each competitor, over the seeds that all of them have.

    Policies of an encoding that answer alike, as at the training size, are one line: the first of them.
    """
    values: dict[tuple[str, str], dict[float, float]] = {}
    right: dict[tuple[str, str], dict[float, Right]] = {}
    n: dict[tuple[str, str], float | None] = {}
    for row, answers in found:
        key = (row.subject, " · ".join([row.policy, *([] if row.temperature == "none" else [row.temperature])]))
        values.setdefault(key, {})[row.seed or 0.0] = row.value
        right.setdefault(key, {})[row.seed or 0.0], n[key] = answers, row.n
    seeds = set.intersection(*(set(each) for each in values.values()))
    lines: dict[str, list[tuple[str, Line]]] = {}
    for (encoding, policy), all_values in values.items():
        kept = {seed: value for seed, value in sorted(all_values.items()) if seed in seeds or not seeds}
        name = ('"none"' if encoding == "none" else encoding) if several else policy  # no word of a sentence
        only = right[encoding, policy][min(kept)] if len(kept) == 1 else None
        line = Line(name, name, kept, only, n[encoding, policy])
        same = lines.setdefault(name, [])
        if not any(_alike(line, before) for _, before in same):
            same.append((policy, line))
    return [
        line._replace(label=f"{name} ({policy})") if len(same) > 1 else line
        for name, same in lines.items()
        for policy, line in same
    ]


def _alike(one: Line, other: Line) -> bool:
    if one.right is not None and other.right is not None:
        return torch.equal(one.right, other.right)
    return one.values == other.values
