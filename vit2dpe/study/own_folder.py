"""The folder of a study: `run.out`, or the first of `out-2`, `out-3`, ... that holds no other study's results.

Two studies are the same where their trainings depend on the same settings and data: encodings, depths, seeds, sizes,
policies and temperatures may differ, since they add to it or select from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path

from ..data.identity import FILES, same_data
from ..errors import CheckpointError, DataError
from ..spec import Plain, Settings, plain
from ..training.checkpoint import read_meta
from .rows import read_rows
from .trials import Measure, digest_of, training_settings

STUDY = "study"  # key of its digest in env.json
_OF_A_TRIAL = ("encoding", "depth", "seed", "training")
_FREE = (  # settings that may differ within a study, or that change no row
    *("encodings", "sizes", "lengths", "depths", "modes", "policies", "temperatures", "seeds", "jobs", "quick"),
    *("training", "per_class", "finetune", "data.workers", "data.cache", "data.unreadable"),
)


def own_folder(measure: Measure) -> tuple[Path, str]:
    """The folder for this study's results, and the digest of what its trainings depend on.

    Prints a line where the folder is not `run.out`.
    """
    config = measure.plan.config
    trained = training_settings(measure, measure.plan.trials[0])
    wanted, digest = Path(config.run.out), _digest(trained)
    typed = trained | dict(train_size="{}x{}".format(*measure.plan.train_size))  # as the first version kept it
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not (folder / "results.csv").is_file():
            break
        digests = {digest, _digest(typed)}
        if _older(folder):
            digests.add(_digest(trained | {"precision": config.run.precision}))  # "auto" on any device
        if _holds(folder, digests, measure):
            digest = str(_about(folder).get(STUDY, digest))  # another one where data.cache was decided otherwise
            break
    if folder != wanted:
        why = _differences(wanted, config)
        print(f"note: {wanted} holds the results of another study{why}; those of this one go to {folder}")
    if absent := _not_chosen(folder, measure):
        print(
            f"note: results.csv will be without {', '.join(absent)}, which {folder} keeps for when they are named again"
        )
    return folder, digest


def _not_chosen(folder: Path, measure: Measure) -> list[str]:
    """Encodings, and seeds, of which the folder has results, and which are not among those of this plan."""
    if not (folder / "results.csv").is_file():
        return []
    try:
        rows = read_rows(folder / "results.csv")
    except DataError:
        return []
    trials = measure.plan.trials
    subjects, seeds = {(trial.encoding, trial.training) for trial in trials}, {trial.seed for trial in trials}
    more = [f"seed {row.seed:g}" for row in rows if row.seed is not None and row.seed not in seeds]
    return list(dict.fromkeys([*(row.subject for row in rows if (row.encoding, row.training) not in subjects), *more]))


def _digest(trained: Mapping[str, Plain]) -> str:
    return digest_of({name: value for name, value in trained.items() if name not in _OF_A_TRIAL})


def _holds(folder: Path, digests: set[str], measure: Measure) -> bool:
    """Whether the results in a folder are of the study with one of these digests; older folders say so by trials.

    Rows of one depth do not say which, so that those of another depth would be taken for them.
    """
    about, depths = _about(folder), measure.plan.depths
    trained = [one for one, here in _trained(folder, measure) if _digest(here) in digests]
    digests = digests | {_digest(one) for one in trained}
    if about.get(STUDY) not in digests and (STUDY in about or not trained):
        return False
    there = {one["depth"] for one in trained if "depth" in one}
    return len(depths) > 1 or len(there) != 1 or set(depths) == there


def _older(folder: Path) -> bool:
    """Whether a trial there does not keep where it was trained."""
    for path in folder.glob("cells/*/last/model.json"):
        with suppress(CheckpointError):
            if "ran" not in read_meta(path.parent):
                return True
    return False


def _trained(folder: Path, measure: Measure) -> Iterator[tuple[Mapping[str, Plain], Mapping[str, Plain]]]:
    """What the trainings of the trials in a folder depended on, as it stands there, and with the digest that the data
    have here if they are the same."""
    data = {"digest": measure.source[1], FILES: measure.files}
    for path in sorted(folder.glob("cells/*/last/model.json")):
        try:
            about = read_meta(path.parent)
        except CheckpointError:
            continue
        trained = about.get("trained")
        if isinstance(trained, Mapping):
            same = same_data({"digest": trained.get("data"), FILES: about.get(FILES)}, data)
            yield trained, {**trained, "data": measure.source[1]} if same else trained


def _about(folder: Path) -> Mapping[str, Plain]:
    try:
        found = json.loads((folder / "env.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _differences(folder: Path, config: Settings) -> str:
    """ " (optim.epochs 12, here 40)": up to three settings in which the study there differs, where they are known."""
    there, here = dict(_flat(_about(folder).get("config"))), dict(_flat(plain(config)))
    names = [name for name in here if name in there and there[name] != here[name] and name not in _FREE]
    names = [name for name in names if not name.startswith("run.")]
    said = ", ".join(f"{name} {there[name]}, here {here[name]}" for name in names[:3])
    return f" ({said})" if said else ""


def _flat(settings: Plain, start: str = "") -> Iterator[tuple[str, Plain]]:
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _flat(value, f"{start}{name}.")
    else:
        yield start.removesuffix("."), settings
