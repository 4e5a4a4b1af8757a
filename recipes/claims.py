"""Claims that were written down before a study ran, as differences that each of them says are not below zero.

Their words stand in RESULTS.md or in the head of the recipe, and so does the rule by which they are judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from vit2dpe.study.rows import Row, read_rows


def half_interval(values: list[float]) -> float:
    """Half of the 95% t-interval of the mean of these seeds."""
    return half_of_deviation(statistics.stdev(values), len(values))


def half_of_deviation(deviation: float, n: int) -> float:
    """The same, from the standard deviation of n seeds."""
    return float(student.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


FAMILIES = {
    "distance biases": ("alibi", "lookhere", "fire"),
    "rotary": ("rope", "rope_mixed", "rope_golden"),
    "tables": ("learned", "windowed", "factorized", "relative"),
}


class Difference(NamedTuple):
    """What is compared, at which multiple of the training side, and by how much it differs with each seed."""

    what: str
    multiple: float
    by_seed: list[float]

    def interval(self) -> tuple[float, float] | None:
        """95%, over seeds; None with one seed."""
        if len(self.by_seed) < 2:
            return None
        mean, half = statistics.mean(self.by_seed), half_interval(self.by_seed)
        return mean - half, mean + half


def verdict(differences: list[Difference], missing: Iterable[str] = ()) -> str:
    """The rule: a claim is confirmed when no interval reaches below zero, refuted when one lies wholly below zero."""
    intervals = [difference.interval() for difference in differences]
    known = [interval for interval in intervals if interval is not None]
    if missing := sorted(set(missing)):
        return f"undecided: {', '.join(f'`{word}`' for word in missing)} not finished"
    if len(known) < len(intervals) or not known:
        return "undecided: fewer than two seeds give no interval"
    if any(high < 0 for _, high in known):
        return "refuted"
    return "confirmed" if all(low >= 0 for low, _ in known) else "undecided: an interval holds zero"


class Values:
    """Accuracies of a study in one mode by encoding (`Row.subject`), policy, temperature, multiple of the training side
    and seed."""

    def __init__(self, rows: list[Row], mode: str = "scale") -> None:
        self.rows = rows
        self.default: dict[str, str] = {}
        self.at: dict[tuple[str, str, str, float], dict[int, float]] = {}
        for row in rows:
            if row.mode != mode:
                continue
            self.default.setdefault(row.subject, row.policy)
            multiple = math.sqrt(row.height * row.width / (row.train_height * row.train_width))
            key = (row.subject, row.policy, row.temperature, round(multiple, 2))
            self.at.setdefault(key, {})[int(row.seed or 0)] = row.value

    def of(self, word: str, multiple: float, policy: str = "") -> dict[int, float]:
        return self.at.get((word, policy or self.default.get(word, ""), "none", multiple), {})

    def best(self, family: str, multiple: float) -> str:
        """The member with the highest mean over seeds."""
        ran = [word for word in FAMILIES[family] if self.of(word, multiple)]
        return max(ran, key=lambda word: statistics.mean(self.of(word, multiple).values()), default="")


def paired(what: str, multiple: float, more: dict[int, float], less: dict[int, float]) -> Difference:
    return Difference(what, multiple, [more[seed] - less[seed] for seed in sorted(more.keys() & less.keys())])


def biases_rotary_tables(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 1: at 2x and 3x distance biases keep more than rotary encodings, and those more than tables."""
    found = []
    for above, below in (("distance biases", "rotary"), ("rotary", "tables")):
        for multiple in (2.0, 3.0):
            a, b = values.best(above, multiple), values.best(below, multiple)
            what = f"{above} (`{a}`) − {below} (`{b}`)"
            found.append(paired(what, multiple, values.of(a, multiple), values.of(b, multiple)))
    return found, [word for family in FAMILIES.values() for word in family if word not in values.default]


def mixed_keeps_as_much(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 2: `rope_mixed` keeps at least as much as `rope` at every size beyond training, both extrapolating."""
    sizes = sorted({key[3] for key in values.at if key[3] > 1})
    both = [[values.of(word, size, "extrapolate") for word in ("rope_mixed", "rope")] for size in sizes]
    found = [paired("`rope_mixed` − `rope`", size, *pair) for size, pair in zip(sizes, both, strict=True)]
    return found, [word for word in ("rope", "rope_mixed") if word not in values.default]


def temperature_helps(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 3: at 3x and 4x the mean over encodings and policies is higher with the length temperature."""
    found = []
    for multiple in (3.0, 4.0):
        pairs = [
            (by_seed, values.at[word, policy, "none", multiple])
            for (word, policy, temperature, m), by_seed in values.at.items()
            if temperature == "log" and m == multiple and (word, policy, "none", multiple) in values.at
        ]
        seeds = set.intersection(*({*a} & {*b} for a, b in pairs)) if pairs else set()
        by_seed = [statistics.mean(a[seed] - b[seed] for a, b in pairs) for seed in sorted(seeds)]
        found.append(Difference(f"with − without, mean of {len(pairs)}", multiple, by_seed))
    return found, []


def _jittered(values: Values, word: str, multiple: float, more: float = 0.0) -> dict[int, float]:
    """What jitter in training changes, by seed, under `interpolate`; `more` is added."""
    plain = values.of(word, multiple, "interpolate")
    moved = values.of(f"{word}, jitter", multiple, "interpolate")
    return {seed: moved[seed] - plain[seed] + more for seed in sorted(moved.keys() & plain.keys())}


def _lifts(word: str, values: Values) -> tuple[list[Difference], list[str]]:
    what = f"`{word}, jitter` − `{word}`"
    found = [Difference(what, multiple, list(_jittered(values, word, multiple).values())) for multiple in (2.0, 3.0)]
    return found, [one for one in (word, f"{word}, jitter") if one not in values.default]


def jitter_lifts_tables(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 1 of `study_places_*`: at 2x and 3x a table that was jittered in training has more."""
    return _lifts("learned", values)


def more_than_rotations(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 2: jitter lifts a table more than a rotation."""
    what = "(`learned, jitter` − `learned`) − (`rope, jitter` − `rope`)"
    of = [[_jittered(values, word, multiple) for word in ("learned", "rope")] for multiple in (2.0, 3.0)]
    found = [paired(what, multiple, *pair) for multiple, pair in zip((2.0, 3.0), of, strict=True)]
    return found, [*_lifts("learned", values)[1], *_lifts("rope", values)[1]]


def jitter_costs_little(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 3: at the training size jitter costs at most a point."""
    words = ("learned", "relative", "rope")
    found = [
        Difference(f"`{word}, jitter` − `{word}` + 1", 1.0, list(_jittered(values, word, 1.0, more=1.0).values()))
        for word in words
    ]
    return found, [one for word in words for one in _lifts(word, values)[1]]


def jitter_lifts_offsets(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 4: the first, of a table over offsets."""
    return _lifts("relative", values)


def parts_serve_canvases(values: Values) -> tuple[list[Difference], list[str]]:
    """Claim 5: parts of a table at scale 1 keep more of a larger canvas than a table that is read between entries."""
    canvas, word = Values(values.rows, "canvas"), "learned, subtable"
    found = [
        paired(
            f"`{word}` − `learned`, canvas",
            multiple,
            canvas.of(word, multiple, "subtable"),
            canvas.of("learned", multiple, "interpolate"),
        )
        for multiple in (1.5, 2.0)
    ]
    return found, [one for one in (word, "learned") if one not in canvas.default]


CLAIMS = (biases_rotary_tables, mixed_keeps_as_much, temperature_helps)
PLACES = (jitter_lifts_tables, more_than_rotations, jitter_costs_little, jitter_lifts_offsets, parts_serve_canvases)
OF = {"study_places_digits": PLACES, "study_places_cifar10_cpu": PLACES}  # by folder; else `CLAIMS`


def claims(folder: Path) -> str:
    """The verdict on each claim and the differences it rests on."""
    values = Values(read_rows(folder / "results.csv"))
    said, lines = (
        [],
        ["| claim | difference in points | at | mean | 95% interval | seeds |", "|---|---|---|---:|---:|---:|"],
    )
    for number, claim in enumerate(OF.get(folder.name, CLAIMS), 1):
        differences, missing = claim(values)
        said.append(f"- Claim {number} is **{verdict(differences, missing).replace(':', '**:', 1)}")
        said[-1] += "." if "**:" in said[-1] else "**."
        for one in differences:
            mean = f"{statistics.mean(one.by_seed):+.1f}" if one.by_seed else ""
            interval = one.interval()
            span = f"{interval[0]:+.1f} to {interval[1]:+.1f}" if interval else ""
            lines.append(f"| {number} | {one.what} | {one.multiple:g}x | {mean} | {span} | {len(one.by_seed)} |")
    return "\n".join([*said, "", *lines])
