"""A model's policy at another size, chosen without labels: `tune`.

The model at its own size is the teacher, the same model at the other size the student, both on the same pictures. What
is sought is the policy and the temperature with the least divergence between them,

    D = mean over images of KL(p_teacher ‖ p_student),    in nats

on one half of the images; what is told of it is measured on the other half.

Source: none known; by hand, with labels, one knob at a time: YaRN (arXiv 2309.00071), LookHere (arXiv 2405.13985).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.splits import scaled
from ..encodings import encodings_of
from ..errors import ConfigError
from ..modes import evaluating
from ..spec import Size, show_size
from .apply import position_groups, use_policy, windows_of
from .sweep import train_size_of

Images = Iterable[Tensor | tuple[Tensor, ...]]
STEPS = (0.5, 0.25, 0.125)  # of powers
BOUNDS = (-2.0, 4.0)
MARGIN = 0.01  # of the divergence that a setting must lower for the search to move there
LEAST = 8  # images
DRAWS, LEVEL = 4000, 0.95


class Setting(NamedTuple):
    """What is sought, by its parts.

    Args:
        windows: "keep" or "scale" of a Swin, or "".
        formula: the policy of formulas, or "".
        table: whether there are tables beside it.
        mode: how tables are resized; None: each in its own way.
        power: of rows and columns.
        temperature: a word, or the power of "log".
    """

    windows: str
    formula: str
    table: bool
    mode: str | None = None
    power: tuple[float, float] = (1.0, 1.0)
    temperature: str | float = "none"

    def words(self) -> tuple[str, str]:
        """The policy and the temperature as `use_policy` takes them."""
        options = [] if self.power == (1.0, 1.0) else [f"power={_number(self.power)}"]
        formula = self.formula if self.formula == "extrapolate" else _call(self.formula, options)
        table = _call("resize", [*([] if self.mode is None else [f"mode={self.mode}"]), *options]) if self.table else ""
        policy = "+".join(filter(None, (self.windows, formula, table)))
        if isinstance(self.temperature, str):
            return policy, self.temperature
        if self.temperature == 1:
            return policy, "log"
        return policy, f"log(power={self.temperature:g})" if self.temperature else "none"


class TuneRow(NamedTuple):
    """A policy and temperature at the size, over n images of the half that the choice was made on ("chosen on") or of
    the other one ("told from").

    Args:
        kl: divergence from the teacher, in nats.
        agreement: of the likeliest class with the teacher's, in percent.
    """

    policy: str
    temperature: str
    half: str
    kl: float
    agreement: float
    n: int


class Gain(NamedTuple):
    """By how many nats the divergence falls, and the bounds that hold it in 95 of 100 cases (paired bootstrap)."""

    nats: float
    low: float
    high: float


class Tuned(NamedTuple):
    """What `tune` found.

    Args:
        policy, temperature: for `set_policy` and `use_policy`; where nothing helps those that the model has.
        helps: whether `gain` lies above 0.
        gain: over what the model does by itself at that size.
        over_plain: over the best policy without a power.
        rows: all that was tried, in order; at the end the model's own, the best plain one and the best, on images that
            they were not chosen on.
    """

    size: Size
    policy: str
    temperature: str
    helps: bool
    gain: Gain
    over_plain: Gain
    rows: list[TuneRow]


def tune(
    model: nn.Module,
    images: Images,
    size: Size,
    *,
    train_size: Size | None = None,
    crop: float = 1.0,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> Tuned:
    """The policy, temperature, scale of each axis and way of resizing tables with which a classifier at `size` agrees
    best with itself at its own size. The model is left as it was: `set_policy(model, found.policy, temperature=...)`.

    First every policy that all encodings can take, without a temperature and with "log", then "yarn" and the ways of
    resizing tables beside the best of them. From there, in steps of 1/2, 1/4 and 1/8, powers: of the scale, of both
    axes and of each alone, and of the temperature. A power is kept only where it is better on the other half as well.

    Args:
        model: a classifier of ours, from images (B, C, H, W) to logits (B, classes).
        images: batches, normalised as the model wants them, of any size, as tensors or tuples that begin with one;
            labels are not read. Iterated once for the teacher, and once for each setting that is tried.
        size: (height, width) in pixels that is wanted.
        train_size: the model's own; default as it remembers it.
        crop: the centre share of each side that is kept, the same for both sizes.
        seed: of the halves and of the bootstrap: the same images and seed give the same choice.
        log: called with a line for each setting that was tried.

    Raises:
        ConfigError: for a model that is no classifier or has nothing to tune, for its own size, one that its patch does
            not divide, and for fewer than 8 images.
    """
    own = train_size or train_size_of(model)
    starts = _settings(model)
    if tuple(size) == tuple(own):
        raise ConfigError(
            f"{show_size(own)} is the model's own size, where no policy changes anything: give another one"
        )
    if not getattr(model, "num_classes", 1):
        raise ConfigError(f"this {type(model).__name__} has no classes to agree on: it is no classifier")
    halves = _Halves(model, images, size, own, crop, seed, log)
    default, (plain, refined) = ("default", "none"), _search(halves, starts)
    told = {words: halves.divergence(words, told=True) for words in (default, plain.words(), refined.words())}

    def gain(over: tuple[str, str], by: tuple[str, str]) -> Gain:
        return _bootstrap(told[over] - told[by], seed)

    chosen = plain.words()
    if refined.words() != chosen and gain(chosen, refined.words()).low > 0:
        chosen = refined.words()
    helps = gain(default, chosen).low > 0
    chosen = chosen if helps else default
    return Tuned(size, *chosen, helps, gain(default, chosen), gain(plain.words(), chosen), halves.rows)


def _settings(model: nn.Module) -> list[Setting]:
    """A start for each policy of formulas that all formulas of the model can take, and of its windows."""
    position_groups(model)
    encodings = encodings_of(model)
    if not encodings:
        raise ConfigError(f"nothing to tune: this {type(model).__name__} has no encoding that a policy could change")
    formulas = [e for e in encodings if "resize" not in e.policies]
    tables = len(formulas) < len(encodings)
    common = [p for p in formulas[0].policies if all(p in e.policies for e in formulas)] if formulas else [""]
    if not any(common) and not tables:
        words = " and ".join(dict.fromkeys(type(e).__name__ for e in formulas))
        raise ConfigError(f"nothing to tune: {words} have no policy in common")
    return [Setting(windows, policy, tables) for windows in windows_of(model) or ("",) for policy in common or [""]]


def _search(halves: _Halves, starts: list[Setting]) -> tuple[Setting, Setting]:
    """The best setting without powers, and the best one."""
    best = halves.best(starts[0], [s._replace(temperature=t) for s in starts for t in ("none", "log")])
    best = halves.best(best, [best._replace(temperature="yarn")])
    best = plain = halves.best(best, [best._replace(mode=mode) for mode in halves.modes() if best.table])
    if best.formula == "extrapolate" and any(s.formula == "interpolate" for s in starts):
        best = best._replace(formula="interpolate", power=(0.0, 0.0))  # the same, with a scale
    here = best._replace(temperature=halves.power_of(best.temperature))
    for step in STEPS:
        while (there := halves.best(here, _around(here, step))) != here:
            here = there
    return plain, here


def _around(at: Setting, step: float) -> Iterator[Setting]:
    """The neighbours of a setting within `BOUNDS`."""
    rows, columns = at.power
    for by in (step, -step):
        if at.formula != "extrapolate":
            for power in ((rows + by, columns + by), (rows + by, columns), (rows, columns + by)):
                if all(BOUNDS[0] <= p <= BOUNDS[1] for p in power):
                    yield at._replace(power=power)
        if isinstance(at.temperature, float) and BOUNDS[0] <= at.temperature + by <= BOUNDS[1]:
            yield at._replace(temperature=at.temperature + by)


class _Halves:
    """The images in two halves, what the teacher answers to them, and what was tried so far."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        size: Size,
        own: Size,
        crop: float,
        seed: int,
        log: Callable[[str], None] | None,
    ) -> None:
        self.model, self.images, self.size, self.crop, self.log = model, images, size, crop, log
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.rows: list[TuneRow] = []
        self.tried: dict[tuple[tuple[str, str], bool], Tensor] = {}
        count = 0
        answers = []
        for batch in _tensors(images):
            answers.append(self._answers(batch, own))
            count += len(batch)
        if count < LEAST:
            raise ConfigError(f"tuning needs at least {LEAST} images, got {count}")
        self.teacher = torch.cat(answers)  # (n, classes) log-probabilities
        self.told = torch.zeros(count, dtype=torch.bool)
        self.told[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2]] = True

    @torch.inference_mode()
    def _answers(self, images: Tensor, size: Size) -> Tensor:
        """(B, classes) log-probabilities on the CPU."""
        with evaluating(self.model):
            logits = self.model(scaled(images.to(self.device), size, self.crop))
        answers: Tensor = logits.float().log_softmax(-1).cpu()
        return answers

    def divergence(self, words: tuple[str, str], told: bool = False) -> Tensor:
        """(n,) KL(teacher ‖ student) of each image of a half, in nats, and a row of it."""
        if (words, told) not in self.tried:
            policy, temperature = words
            mine, answers, start = self.told if told else ~self.told, [], 0
            with use_policy(self.model, policy, temperature=temperature):
                for batch in _tensors(self.images):
                    chosen = mine[start : start + len(batch)]
                    start += len(batch)
                    if chosen.any():
                        answers.append(self._answers(batch[chosen], self.size))
            if start != len(mine):
                raise ConfigError(f"images must be the same at each iteration: first {len(mine)}, now {start}")
            student, teacher = torch.cat(answers).double(), self.teacher[mine].double()
            kl = (teacher.exp() * (teacher - student)).sum(-1)
            agreement = 100 * float((student.argmax(-1) == teacher.argmax(-1)).double().mean())
            half = "told from" if told else "chosen on"
            self.rows.append(row := TuneRow(policy, temperature, half, float(kl.mean()), agreement, len(kl)))
            self.tried[words, told] = kl
            if self.log is not None:
                self.log(f"{row.policy}, temperature {row.temperature}: {row.kl:.4f} nats, {row.agreement:.1f}%")
        return self.tried[words, told]

    def best(self, first: Setting, others: Iterable[Setting]) -> Setting:
        """The setting of the least divergence; the first one, unless another is lower by the share `MARGIN`."""
        by_mean = {setting: float(self.divergence(setting.words()).mean()) for setting in (first, *others)}
        least = min(by_mean, key=by_mean.__getitem__)
        return least if by_mean[least] < (1 - MARGIN) * by_mean[first] else first

    def modes(self) -> list[str]:
        """The ways of resizing that all tables of the model can take."""
        tables = [e for e in encodings_of(self.model) if e.resizes]
        return [mode for mode in (tables[0].resizes if tables else ()) if all(mode in e.resizes for e in tables)]

    def power_of(self, temperature: str | float) -> str | float:
        """A temperature as a power of "log"; as it is where it changes nothing, as in windows that keep their size."""
        if isinstance(temperature, float):
            return temperature
        changed = {float(kl.mean()) for ((_, word), _), kl in self.tried.items() if word in ("none", "log")}
        if len(changed) == 1:
            return temperature
        return {"none": 0.0, "log": 1.0, "yarn": 0.5}[temperature]


def _tensors(images: Images) -> Iterator[Tensor]:
    for batch in images:
        yield batch if isinstance(batch, Tensor) else batch[0]


def _bootstrap(difference: Tensor, seed: int) -> Gain:
    """The mean of (n,) differences of the same images, and the percentiles of its paired bootstrap."""
    n, generator = len(difference), torch.Generator().manual_seed(seed)
    means = torch.cat(
        [
            difference[torch.randint(n, (draws, n), generator=generator)].mean(1)
            for draws in [max(1, min(DRAWS, 2_000_000 // n))] * -(-DRAWS // max(1, min(DRAWS, 2_000_000 // n)))
        ]
    )
    low, high = means.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=means.dtype)).tolist()
    return Gain(float(difference.mean()), low, high)


def _call(name: str, options: list[str]) -> str:
    return f"{name}({', '.join(options)})" if name and options else name


def _number(power: tuple[float, float]) -> str:
    rows, columns = power
    return f"{rows:g}" if rows == columns else f"({rows:g}, {columns:g})"
