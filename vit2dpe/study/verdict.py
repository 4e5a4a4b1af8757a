"""What a study has found, in sentences: what leads where, what cannot be told apart, and what would sharpen it.

The rule by which models are told apart, and the intervals, are those of `compare`. A model has learned nothing where
Wilson's interval of its accuracy at the training size reaches down to that of naming the most frequent class.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..spec import Plain
from .answers import Right
from .brought import what_weights_brought
from .compare import AtSize, Behind, Line, compare
from .intervals import DRAWS, Interval, images_needed, seeds_needed, wilson
from .rows import Row
from .tables import AT_HAND, FIT, MAJORITY, START, Metric, metric_of, spell

POINTS = 5.0  # a difference that one would like to see
_OF_SCRATCH = (  # what a command says about a model from scratch, or its size
    *("train_size", "size", "data.size", "sizes", "arch", "stages", "window", "depths", "depth", "model.depth"),
    *("width", "model.width", "heads", "model.heads", "patch", "model.patch", "mlp_ratio", "model.mlp_ratio"),
    *("epochs", "optim.epochs", "lr", "optim.lr", "warmup_epochs", "optim.warmup_epochs"),
)
NAMED = 3  # competitors behind the leader with their distance; the others by name
MODES = {"scale": "the same picture with more pixels", "canvas": "more content at the scale of training"}
CUT = {  # data.fit
    "crop": "Photos were cut to the middle of their longer side",
    "pad": "Photos were shown whole, with a margin at their short sides",
    "squash": "Photos were squashed to one shape",
}


class Verdict(NamedTuple):
    """Sentences about a study.

    Args:
        short: what matters, first.
        parts: (heading, a sentence for each size); one for each mode and depth.
        basis: what the intervals are, and what they say nothing about.
        next: the command that would sharpen the answer; empty where none would. why: what it is for.
    """

    short: list[str]
    parts: list[tuple[str, list[str]]]
    basis: list[str]
    why: str
    next: str

    def text(self) -> str:
        """For a screen."""
        lines = [*self.short, ""]
        for heading, sentences in self.parts:
            lines += [heading, *(f"  {sentence}" for sentence in sentences), ""]
        lines += self.basis
        return "\n".join([*lines, *([f"{self.why}: {self.next}"] if self.next else [])])

    def markdown(self) -> str:
        lines = ["## The verdict", "", *(f"**{sentence}**" for sentence in self.short), ""]
        for heading, sentences in self.parts:
            lines += [heading, "", *(f"- {sentence}" for sentence in sentences), ""]
        lines += [" ".join(self.basis), ""]
        return "\n".join([*lines, *([f"{self.why}:", "", f"    {self.next}", ""] if self.next else [])])


def verdict(
    rows: Sequence[Row], answers: Sequence[Right] | None = None, about: Mapping[str, Plain] | None = None
) -> Verdict | None:
    """The verdict of a study; None before a trial is finished.

    Args:
        rows: as in `results.csv`; answers: of each row, where they were kept.
        about: content of env.json: the command, and how often naming the most frequent class is right.
    """
    if not rows:
        return None
    about, places, metric = about or {}, compare(rows, answers), metric_of(rows)
    if not places:
        return Verdict(["No value is finite: nothing can be compared."], [], [], "", "")
    found = about.get(MAJORITY)
    majority = float(found) if isinstance(found, int | float) and metric.name.startswith("top-1") else None
    panels = list(dict.fromkeys(place.panel for place in places))
    learned_nothing = _learned_nothing(places, majority)
    nothing = bool(learned_nothing) and len(learned_nothing) == len({row.subject for row in rows})
    short = []
    if nothing:
        short.append(
            f"Nothing has been learned yet: at the training size no model is above naming the most frequent class "
            f"({majority:.1f}%), so the differences below mean nothing."
        )
    elif learned_nothing:
        short.append(
            f"At the training size not above naming the most frequent class ({majority:.1f}%), so nothing was learned "
            f"with: {_list(learned_nothing)}."
        )
    parts = []
    for panel in panels:
        here = [place for place in places if place.panel == panel]
        label = "" if len(panels) == 1 else f"{panel}: "
        short += [] if nothing else [_headline(label, here, metric)]
        parts.append((_heading(panel), [_sentence(place, metric, majority) for place in here]))
    headline, what = what_weights_brought(rows, answers, about)
    if headline:
        short.append(headline)
        parts.append(("What the weights brought, against the same model from scratch:", what))
    basis = [*_basis(places, metric, majority, about), *_needed(places, metric)]
    return Verdict(short, parts, basis, *_next(places, nothing, about))


def _heading(panel: str) -> str:
    mode, _, depth = panel.partition(", depth")
    said = f"{mode}, {MODES[mode]}" if mode in MODES else mode
    return f"{said}{', depth' if depth else ''}{depth}:"


def _headline(label: str, places: Sequence[AtSize], metric: Metric) -> str:
    """Which one leads at which sizes, and where several may."""
    what = "sizes" if metric.over == "image size" else "lengths"
    if not any(place.others for place in places):
        return f"{label}only {places[0].leader.name} was measured: there is nothing to compare it with."
    if not any(place.over for place in places):
        firsts = _list([f"{place.leader.label} at {_size(place)}" for place in places])
        return f"{label}first: {firsts}; without intervals that may be chance."
    alone: dict[str, list[AtSize]] = {}
    for place in places:
        if place.over and len(place.group) == 1 and place.others:
            alone.setdefault(place.leader.name, []).append(place)
    shared = [place for place in places if place not in [one for found in alone.values() for one in found]]
    if not alone:
        return f"{label}at none of the measured {what} can a single best one be named."
    said = "; ".join(f"{name} leads at {_list([_size(place) for place in found])}" for name, found in alone.items())
    if shared:
        said += f"; at {_list([_size(place) for place in shared])} no single best one can be named"
    return f"{label}{said}."


def _sentence(place: AtSize, metric: Metric, majority: float | None) -> str:
    """Who is first at a size, who may be as good, and how far behind the others are."""
    at, group, value = f"At {_size(place)}", place.group, _value(place.leader.mean, metric)
    apart = [other for other in place.others if other.apart]
    if not place.others:
        said = f"{at} {place.leader.label} has {value}{_own_interval(place, metric)}"
    elif not place.over:
        said = f"{at} {place.leader.label} is first with {value}; behind it: {_each(place.others, metric)}"
    elif len(group) == 1:
        said = f"{at} {place.leader.label} leads with {value}; behind it: {_each(apart, metric)}"
    else:
        near = [other for other in place.others if not other.apart]
        said = f"{at} {place.leader.label} has {value} and cannot be told apart from {_each(near, metric, near=True)}"
        said += f"; clearly behind: {_each(apart, metric)}" if apart else ""
    if majority is not None and (poor := [line.label for line in _lines(place) if _no_better(line, majority)]):
        said += f"; not above the most frequent class: {_list(poor)}"
    return f"{said}."


def _each(others: Sequence[Behind], metric: Metric, near: bool = False) -> str:
    """ "rope by 3 points [1 to 5], ...", or "rope (3 points lower [-1 to 7]), ..."; the last ones by name alone."""
    than = "lower" if metric.more_is_better else "higher"
    named = [
        f"{other.line.label} ({_distance(other.by, metric)} {than}{_interval(other.interval)})"
        if near
        else f"{other.line.label} by {_distance(other.by, metric)}{_interval(other.interval)}"
        for other in others[:NAMED]
    ]
    return _list([*named, *(other.line.label for other in others[NAMED:])])


def _lines(place: AtSize) -> list[Line]:
    return [place.leader, *(other.line for other in place.others)]


def _no_better(line: Line, majority: float) -> bool:
    return line.n is not None and wilson(line.mean, line.n).low <= majority


def _learned_nothing(places: Sequence[AtSize], majority: float | None) -> list[str]:
    """Those that are not above the majority class at the training size, in any mode or depth."""
    if majority is None:
        return []
    at_train = [place for place in places if place.size == place.train_size]
    lines = [line for place in at_train for line in _lines(place)]
    above = {line.name for line in lines if not _no_better(line, majority)}
    return list(dict.fromkeys(line.name for line in lines if line.name not in above))


def _basis(places: Sequence[AtSize], metric: Metric, majority: float | None, about: Mapping[str, Plain]) -> list[str]:
    """What was measured on how much, and what the intervals are."""
    leader, counts = places[0].leader, sorted({len(place.leader.values) for place in places})
    seeds = f"{counts[0]} seed{'s' if counts[-1] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} or more seeds"
    items = {"image size": "test images"}.get(metric.over, "sequences" if "sequences" in metric.name else "tokens")
    said = [f"Measured: {metric.name}, {'' if leader.n is None else f'on {int(leader.n)} {items}, '}{seeds}."]
    if majority is not None:
        said.append(f"Naming the most frequent class is right for {majority:.1f}%.")
    if START in about:
        said.append(f"Every encoding started from {about[START]}.")
    if about.get(FIT) in CUT:
        said.append(f"{CUT[str(about[FIT])]} (data.fit {about[FIT]}).")
    over = {place.over for place in places}
    if "seeds" in over:
        said.append(
            f"In brackets: t intervals of the differences to the leader over {seeds}, 95% for all comparisons of a "
            "size together (Bonferroni)."
        )
    if "images" in over:
        said.append(
            f"In brackets: intervals of the differences to the leader from {DRAWS:,} paired bootstrap draws of the "
            f"{items}, 95% for all comparisons of a size together. With one seed they say nothing about another "
            "training."
        )
    if "" in over and any(place.others for place in places if not place.over):
        if metric.more_is_better:
            said.append(
                "No interval can be given: which images each model had right was not kept. Delete cells/*/sweep-*.csv "
                "and the same command measures its trained models again and keeps it; several seeds serve as well."
            )
        else:
            said.append(f"With one seed no interval can be given for {metric.name}: it takes several seeds.")
    return said


def _needed(places: Sequence[AtSize], metric: Metric) -> list[str]:
    """The seeds or images that would show a difference of 5 points, by the median of the measured variances."""
    if not metric.more_is_better:
        return []
    deviations = [(one, place.comparisons) for place in places for one in place.deviations]
    if deviations:
        m = max(comparisons for _, comparisons in deviations)
        need, have = seeds_needed(statistics.median(one for one, _ in deviations), m), len(places[0].leader.values)
        enough = f"the {have} seeds here are enough" if need <= have else f"it takes about {need} seeds (here {have})"
        return [f"To see a difference of {POINTS:g} points in 4 of 5 cases {enough}."]
    counts = [
        images_needed(difference, place.critical)
        for place in places
        if place.differences is not None
        for difference in place.differences
    ]
    if not counts:
        return []
    need, have = round(statistics.median(counts)), int(places[0].leader.n or 0)
    items = "test images" if metric.over == "image size" else "sequences"
    enough = f"the {have} {items} here are enough" if need <= have else f"it takes about {need} {items} (here {have})"
    return [f"To see a difference of {POINTS:g} points in 4 of 5 cases {enough}."]


def _next(places: Sequence[AtSize], nothing: bool, about: Mapping[str, Plain]) -> tuple[str, str]:
    """What would sharpen the answer, and the command."""
    seeds = max(len(place.leader.values) for place in places)
    config = about.get("config")
    optim = config.get("optim") if isinstance(config, Mapping) else None
    epochs = optim.get("epochs") if isinstance(optim, Mapping) else None
    if isinstance(config, Mapping) and config.get("smoke"):
        return "Two steps teach nothing; the study itself", _command(about, {}, drop=("smoke",))
    if found := about.get(AT_HAND):
        return "To start from weights that are at hand", _command(about, {"init": str(found)}, drop=_OF_SCRATCH)
    if nothing and isinstance(epochs, int | float):
        return "To train longer", _command(about, {"epochs": f"{int(3 * epochs)}"}, drop=("optim.epochs",))
    competing = [place for place in places if place.others]
    if not competing:
        return "", ""
    if seeds == 1:
        return "To learn what another training would change", _command(about, {"seeds": "3"})
    if all(len(place.group) == 1 for place in competing):
        return "", ""
    m, widths = max(place.comparisons for place in competing), [one for place in competing for one in place.deviations]
    need = seeds_needed(statistics.median(widths), m) if widths else seeds + 2
    return "For narrower intervals", _command(about, {"seeds": f"{max(seeds + 2, min(need, 4 * seeds))}"})


def _command(about: Mapping[str, Plain], options: Mapping[str, str], drop: Sequence[str] = ()) -> str:
    """The command of the study with other values of these options; of a study in Python by its config.yaml."""
    try:
        words = shlex.split(str(about.get("command") or ""))
    except ValueError:
        words = []
    if words[:2] != ["vit2dpe", "study"]:
        config = about.get("config")
        run = config.get("run") if isinstance(config, Mapping) else None
        out = run.get("out") if isinstance(run, Mapping) else "runs/study"
        words = ["vit2dpe", "study", "--config", f"{out}/config.yaml"]
    kept, skip = [], False
    for i, word in enumerate(words):
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if skip or (word.startswith("--") and name in (*options, *drop)):
            takes_next = not skip and "=" not in word and i + 1 < len(words) and not words[i + 1].startswith("--")
            skip = takes_next
            continue
        kept.append(word)
    return shlex.join([*kept, *(word for name, value in options.items() for word in (f"--{name}", value))])


def _size(place: AtSize) -> str:
    return f"{spell(place.size)} (training)" if place.size == place.train_size else spell(place.size)


def _value(value: float, metric: Metric) -> str:
    return f"{value:.1f}%" if metric.more_is_better else f"{metric.name} {value:.2f}"


def _distance(by: float, metric: Metric) -> str:
    return f"{by:.1f} points" if metric.more_is_better else f"{by:.2f}"


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:.1f} to {interval.high:.1f}]"


def _own_interval(place: AtSize, metric: Metric) -> str:
    one = place.leader
    return _interval(wilson(one.mean, one.n)) if metric.more_is_better and one.n and len(one.values) == 1 else ""


def _list(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
