"""Studies that start from weights: their architecture, the encodings that are tried on them, the size to train at.

Every trial starts from the same weights with its encoding in place of theirs (`training.start`). `keep` is theirs; with
it a control is trained, the same model from scratch.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import yaml

from ..data.settings import LADDER
from ..encodings import ENCODINGS
from ..errors import CheckpointError, ConfigError
from ..interop.own_encoding import names_of, with_own_options
from ..spec import Size, Words, filled
from ..training.checkpoint import read_meta
from ..training.settings import MASKED
from ..training.start import describe, has_architecture
from ..training.starting_model import Start
from .settings import StudyConfig

KEEP = "keep"  # the encoding of the weights
OTHERS = ("none", "learned", "rope", "relative")  # where none is named: no places, a table, rotations, a bias
TIMES = (1.0, 1.5, 2.0, 3.0)  # sizes that are measured, over that of training


def started(config: StudyConfig) -> Start:
    """What `init` names, as data that go to other processes; its weights are read by `load_into`.

    Raises:
        ConfigError, CheckpointError: for what a study cannot start from.
    """
    source = str(config.init)
    path = Path(source).expanduser()
    if path.is_file() and not has_architecture(path):
        raise ConfigError(
            f"the architecture of {source} is not known: there is no model.json and no config.json beside it; name it: "
            f"--init \"NAME(pretrained_cfg_overlay={{'file': '{source}'}})\" with a name of timm"
        )
    if config.arch != "vit" or config.depths:
        raise ConfigError("the architecture comes with the weights of --init: leave out --arch and --depths")
    return replace(describe(source), read=dict)


def with_weights(config: StudyConfig, start: Start) -> StudyConfig:
    """The settings with those of the model that come with the weights, where they are open."""
    own = {f"model.{name}": value for name, value in start.settings.items() if name not in ("name", "position")}
    return filled(config, own)


def words_for(given: Words | None, start: Start) -> Words:
    """The encodings of a study from weights, `keep` spelled out; a word that means the same encoding is it.

    Raises:
        ConfigError: for another encoding than `keep` where theirs cannot be exchanged.
    """
    if given is None:
        given = (KEEP, *(OTHERS if start.position is not None else ()))
    elif given == ("all",):
        given = (KEEP, *ENCODINGS)
    return tuple(dict.fromkeys(_word(word, start) for word in given))


def _word(word: str, start: Start) -> str:
    own = start.position
    if own is None:
        if word != KEEP:
            raise start.reason or ConfigError(f"the encoding of {start.source} cannot be exchanged: --encodings keep")
        return KEEP
    word = re.sub(r"(^|\+)keep(?=$|\+)", lambda found: f"{found[1]}{own}", word)
    return own if word == own or (_same_names(word, own) and with_own_options(word, own) == own) else word


def _same_names(word: str, own: str) -> bool:
    return names_of(word) == names_of(own)


def changed_word(encoding: str, start: Start) -> str | None:
    """The encoding to exchange theirs for; None: theirs stays."""
    return None if encoding == kept(start) else encoding


def kept(start: Start) -> str:
    """The word of their encoding in results."""
    return start.position or KEEP


def digest_of_weights(source: str) -> str:
    """Of what is at a path, so that other weights there make another study; of a name itself."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    metas = [place / "model.json" for place in (path / "last", path) if (place / "model.json").is_file()]
    files = [path] if path.is_file() else metas[:1] or sorted(file for file in path.iterdir() if file.is_file())
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()[:16]


def sizes_from(start: Start) -> list[Size]:
    """Sizes to train at: that of the weights, then smaller squares of whole patches, falling."""
    rows, columns = start.patch or (1, 1)
    smaller = [side for side in reversed(LADDER) if side < min(start.size) and side % rows == 0 == side % columns]
    return [start.size, *((side, side) for side in smaller)]


def measured(size: Size, patch: Size) -> list[list[int]]:
    """The sizes of `TIMES`, of whole patches."""
    found = [
        tuple(max(p, round(side * factor / p) * p) for side, p in zip(size, patch, strict=True)) for factor in TIMES
    ]
    return [list(each) for each in dict.fromkeys(found)]


def at_hand(out: Path, root: str | None) -> str | None:
    """The latest run beside a study's folder whose model of images it could start from; None without one.

    Classifiers that were trained on the same photos are passed over: they may have seen the images that are held out.
    """
    found: list[tuple[float, str]] = []
    for file in out.parent.glob("*/last/model.json") if root else ():
        try:
            meta, run = read_meta(file.parent), file.parents[1]
            settings = run / "config.yaml"
            data = (yaml.safe_load(settings.read_text()) or {}).get("data") if settings.is_file() else None
        except (CheckpointError, OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            continue  # damaged, and perhaps none of ours
        theirs = data.get("root") if isinstance(data, dict) else None
        same = theirs is not None and Path(theirs).expanduser().resolve() == Path(str(root)).expanduser().resolve()
        if meta.get("model") in MASKED or (meta.get("task") == "classification" and not same):
            found.append((file.stat().st_mtime, str(run)))
    return max(found)[1] if found else None
