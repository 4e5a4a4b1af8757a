"""A trial of a study: one encoding, depth and seed, trained, measured and written at once.

`<out>/cells/<trial>-<digest of what its training depends on>/` holds the model and, for each set of sizes, policies and
temperatures, the rows that were measured and which test images each has right: a finished training is never repeated,
and neither is a measurement.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..data.identity import FILES, same_data
from ..errors import CheckpointError
from ..files import write_atomically
from ..models.spec import ModelSpec
from ..models.timm_api import every_policy
from ..resolution.apply import policies_of
from ..resolution.policies import kind_of
from ..seeding import derive_seed
from ..spec import Plain, flat
from ..training.checkpoint import load_run, read_meta, write_checkpoint
from ..training.devices import evaluation_precision, pick_device, precision_name
from ..training.engine import fit
from ..training.initial_weights import Loaded
from ..training.run_folder import hardware, printable
from ..training.settings import OptimConfig
from ..training.start import describe
from ..training.task import Task
from ..training.varied import vary
from .answers import Right, read_answers, write_answers
from .from_weights import digest_of_weights
from .jobs import Progress
from .plan import Plan, Trial
from .rows import PLAIN, SCRATCH, WEIGHTS, Row, read_rows, to_csv
from .settings import StudyConfig

# What a finished training depends on; folders are named by a digest of these without what stands before the dot. Other
# settings may change between two runs of one folder.
_TRAINING = (
    "model.width", "model.heads", "model.mlp_ratio", "model.drop_path", "optim.epochs", "optim.batch_size", "optim.lr",
    "optim.weight_decay", "optim.warmup_epochs", "optim.clip_grad", "run.precision", "smoke",
)  # fmt: skip
_IMAGES = ("model.patch", "augment.label_smoothing", "augment.shift", "augment.flip")
_SWIN = ("arch", "stages", "window")
_SEQUENCES = ("task", "train_length", "embed_scale")
# Unless at the default.
_WHERE_SET = re.compile(
    r"(model|augment|optim)\.|data\.val_fraction|data\.balanced|run\.(compile|deterministic|patience)"
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a study trains on, and what it measures a trained model at: over sizes or over lengths.

    Args:
        plan: settings.
        source: name and digest of the data; an empty digest where nothing is read.
        files: digest of their files (`data.identity`), None where there are none.
        classes: of images, or the size of the vocabulary.
        channels: of images.
        facts: further entries of env.json.
        about: facts about the data for the checkpoint.
        unreadable: files that were left out, with the reason.
    """

    plan: Plan
    source: tuple[str, str]
    files: str | None = None
    classes: int
    channels: int = 3
    facts: dict[str, Plain] = field(default_factory=dict)
    about: dict[str, Plain] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    def task(self, seed: int) -> Task:
        """The training of a seed."""
        raise NotImplementedError(f"{type(self).__name__} trains nothing")

    def digest(self) -> str:
        """Digest of the settings that the rows of a trained model depend on."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def rows(self, model: nn.Module, trial: Trial, folder: Path) -> Iterable[tuple[Row, Right]]:
        """Measure the model trained in `folder`: rows, each with which images are right, where that is kept."""
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def write_classes(self, path: Path, rows: Sequence[Row], answers: Sequence[Right]) -> None:
        """Write the accuracy of each class in rows of images, by which of them each has right."""
        raise NotImplementedError(f"{type(self).__name__} has no classes")

    def varied(self, trial: Trial, spec: ModelSpec) -> Measure:
        """With the data as the training of a trial varies them."""
        return self

    def as_trained(self, about: Mapping[str, object]) -> Measure:
        """With the data prepared as they were for a training, whose record this is."""
        return self

    def label(self, row: Row, trial: Trial) -> Row:
        """A row of a trial as this study names it; it may have been measured in one of another number of depths."""
        depth = trial.depth if len(self.plan.depths) > 1 else None
        return replace(row, depth=depth, start=trial.start, training=trial.training)


class Results(NamedTuple):
    """Rows of a trial, and for each of them which test images were right, where that was kept.

    Args:
        ran: where it was trained: device, hardware, precision, torch, seconds; None: an older version did not write it.
    """

    rows: list[Row]
    answers: list[Right]
    ran: Mapping[str, Plain] | None = None


def run_trial(measure: Measure, out: Path, trial: Trial, progress: Progress) -> Results:
    """A trial's rows: read where they are finished, else trained and measured. `out`: folder of all trials."""
    plan, device = measure.plan, pick_device(measure.plan.config.run.device)
    trained = training_settings(measure, trial)
    if plan.config.task == "images":  # the first version kept sizes as they were typed, 32x32 for 32
        typed = trained | dict(train_size="{}x{}".format(*plan.train_size))
        trained = typed if _folder(out, plan, trial, typed).is_dir() else trained
    folder = _folder(out, plan, trial, trained)
    if not folder.is_dir() and (before := _precision_open(out, plan, trial, trained)):
        folder, trained = before
    if measure.files is not None and not folder.is_dir():
        folder, trained = _cached_otherwise(out, measure, trained) or (folder, trained)
    results = folder / f"sweep-{measure.digest()}.csv"
    answers = folder / f"answers-{measure.digest()}.safetensors"
    name = plan.model_name(trial)
    if results.is_file():
        print(f"{name}, seed {trial.seed}: finished before, read from {results}")
        return _read(measure, trial, folder, results, answers)
    if _finished(folder, trained):
        model = load_run(folder, device)
        measure = measure.as_trained(read_meta(folder / "last"))
    else:
        model, spec = build(measure, trial)
        if trial.start == WEIGHTS:
            print(printable(f"{name}, from {plan.config.init}: {_load_weights(model, spec, measure)}"), flush=True)
        vary(model, trial.training)
        at_step = partial(progress, name, trial.seed)
        final = train(model, measure.varied(trial, spec), trial.seed, plan.optim(trial), folder, at_step)
        about = measure.about | ({} if measure.files is None else {FILES: measure.files})
        ran: dict[str, Plain] = dict(
            device=str(device),
            hardware=hardware(device),
            precision=precision_name(plan.config.run.precision, device),
            torch=torch.__version__,
            seconds=final.get("seconds"),
        )
        grid = getattr(model, "train_grid", None)
        tensors = {"model": dict(model.state_dict())}
        write_checkpoint(folder / "last", spec, tensors, grid=grid, trained=trained, **about, final=final, ran=ran)
    with evaluation_precision(plan.config.run.precision, device):
        measured = list(measure.rows(model.to(device), trial, folder))
    table = to_csv(row for row, _ in measured).encode()
    write_answers(answers, [right for _, right in measured], table)
    write_atomically(results, table)
    return _read(measure, trial, folder, results, answers)


def _read(measure: Measure, trial: Trial, folder: Path, table: Path, answers: Path) -> Results:
    rows = [measure.label(row, trial) for row in read_rows(table)]
    return Results(rows, read_answers(answers, table, len(rows)), _ran(folder))


def _ran(folder: Path) -> Mapping[str, Plain] | None:
    with suppress(CheckpointError):  # rows are kept where a model is damaged or gone
        return read_meta(folder / "last").get("ran")
    return None


def _precision_open(
    out: Path, plan: Plan, trial: Trial, trained: Mapping[str, Plain]
) -> tuple[Path, dict[str, Plain]] | None:
    """The training of a version that did not write what "auto" was, on which device; its folder and settings."""
    before = dict(trained) | {"precision": plan.config.run.precision}
    folder = _folder(out, plan, trial, before)
    return (folder, before) if folder.is_dir() and _ran(folder) is None else None


def build(measure: Measure, trial: Trial) -> tuple[nn.Module, ModelSpec]:
    """The model of a trial with its initial weights."""
    torch.manual_seed(derive_seed(trial.seed, "init"))
    spec = measure.plan.model_spec(trial, measure.classes, measure.channels)
    return spec.build(), spec


def _load_weights(model: nn.Module, spec: ModelSpec, measure: Measure) -> Loaded:
    """Copy the weights that a study starts from into the model of a trial."""
    found, classes = measure.about.get("classes"), list[str]()
    if isinstance(found, list):
        classes = [str(name) for name in found]
    return describe(str(measure.plan.config.init)).load_into(model, spec, classes)


def train(
    model: nn.Module,
    measure: Measure,
    seed: int,
    optim: OptimConfig,
    folder: Path,
    progress: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[str, float]:
    """Train a model in place, in its folder; returns the last row of `metrics.csv`."""
    config = measure.plan.config
    every = 0 if config.run.eval_every is None and not config.run.patience else config.run.eval_every
    run, stop_after = replace(config.run, seed=seed, eval_every=every), 2 if config.smoke else None
    return fit(model, measure.task(seed), optim, run, folder=folder, progress=progress, stop_after=stop_after)[-1]


def training_settings(measure: Measure, trial: Trial) -> dict[str, Plain]:
    """What a training depends on, as JSON values; equal settings need no second training."""
    plan, config, default = measure.plan, measure.plan.config, flat(StudyConfig())
    if trial.start == SCRATCH:
        config = replace(config, optim=plan.optim(trial))
    settings, images = flat(config), config.task == "images"
    names = (*_TRAINING, *(_IMAGES if images else _SEQUENCES), *(_SWIN if config.arch == "swin" else ()))
    of_trial: dict[str, Plain] = dict(encoding=trial.encoding, depth=trial.depth, seed=trial.seed)
    of_trial |= {} if trial.training == PLAIN else dict(training=trial.training)
    used = {name.rpartition(".")[2]: settings[name] for name in names} | of_trial
    used |= dict(train_size=settings["data.size"]) if images else {}
    more = {name: value for name, value in settings.items() if _WHERE_SET.match(name) and value != default[name]}
    if (found := precision_name(config.run.precision, pick_device(config.run.device))) != "float32":
        used["precision"] = found  # "auto" where it is float32, as on the CPU, as it always was
    used["data"] = measure.source[1] or config.task
    if plan.start is not None:  # a control has their architecture and their normalization of images
        used["like" if trial.start == SCRATCH else "init"] = digest_of_weights(str(config.init))
    return {name: value for name, value in more.items() if name.rpartition(".")[2] not in used} | used


def _folder(out: Path, plan: Plan, trial: Trial, trained: Mapping[str, Plain]) -> Path:
    """`<encoding>[-depth<n>]-seed<n>-<digest of the training's settings>`; the depth where a study of images has
    several. The digest says which folder it is, whichever study of them made it."""
    encoding = re.sub(r"[^A-Za-z0-9_.+=]+", "_", trial.encoding).strip("_")
    encoding += "" if trial.training == PLAIN else f"-{trial.training}"
    encoding += "-scratch" if trial.start == SCRATCH else ""
    end = f"-seed{trial.seed}-{digest_of(trained)}"
    named, short = out / f"{encoding}-depth{trial.depth}{end}", out / f"{encoding}{end}"
    first, other = (named, short) if plan.config.task != "images" or len(plan.depths) > 1 else (short, named)
    return other if other.is_dir() and not first.is_dir() else first


def _cached_otherwise(
    out: Path, measure: Measure, trained: Mapping[str, Plain]
) -> tuple[Path, dict[str, Plain]] | None:
    """A finished training of these settings on these data, in memory where they are on disk now or the other way
    round, which is why its folder has another digest; and its settings as they stand there."""
    here = {"digest": measure.source[1], FILES: measure.files}
    for path in sorted(out.glob("*/last/model.json")):
        with suppress(CheckpointError):  # damaged, and perhaps none of this study's
            about = read_meta(path.parent)
            before = about.get("trained")
            if not isinstance(before, dict) or before | {"data": trained["data"]} != trained:
                continue
            if same_data({"digest": before["data"], FILES: about.get(FILES)}, here):
                return path.parents[1], before
    return None


def digest_of(settings: Plain) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def policies_for(plan: Plan, model: nn.Module) -> Sequence[str]:
    """The policies of the plan that a model can take; its default where that is none of them."""
    able = policies_of(model)
    if "all" in plan.config.policies:
        chosen = plan.start is not None and plan.start.policy is not None  # by `tune`, for the encoding of the weights
        return every_policy(model) if chosen else able
    return [p for p in plan.config.policies if kind_of(p.split("(")[0]) in (*able, "default")] or able[:1]


def _finished(folder: Path, trained: Mapping[str, Plain]) -> bool:
    return (folder / "last" / "model.json").is_file() and read_meta(folder / "last").get("trained") == trained
