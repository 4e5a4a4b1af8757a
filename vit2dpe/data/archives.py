"""Reads images from one tar file a split, and from datasets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import cache_dir
from ..spec import Size
from .decode import as_rgb, suffixes
from .image_cache import SizesDiffer
from .label_files import LABELS, in_order
from .layout import ROLES, role_of

ENDINGS = (".tar", ".tar.gz", ".tgz")
LAYOUT = "expected <root>/train.tar and <root>/val.tar (or test; .tar.gz, .tgz too), in each <class>/<image>"


def unpack(root: Path) -> Path:
    """Unpack `root/train.tar` and `root/val.tar` into class folders in the cache, once for each state of the files.

    A member's class is the folder that it lies in (the one above, where that is called images, as in Tiny-ImageNet).
    Only the last parts of a member's path are used: none is written outside; links and devices are left out.

    Raises:
        DataError: for a missing or damaged archive.
    """
    archives = _archives(root)
    if "train" not in archives:
        raise DataError(
            f"{root} holds {', '.join(p.name for p in archives.values()) or 'no archive of a split'}; {LAYOUT}"
        )
    stats = [(split, path.stat()) for split, path in archives.items()]
    key = repr([str(root.resolve()), *((split, s.st_size, s.st_mtime_ns) for split, s in stats)])
    target = cache_dir() / f"tar-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    if target.is_dir():
        return target
    making = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    try:
        for split, path in archives.items():
            _unpack_one(path, making / split)
        making.replace(target)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"cannot unpack the archives of {root} into {target}: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target


def _archives(root: Path) -> dict[str, Path]:
    """The archive of each split, by its role, in the order of `ROLES`; valid.tar is that of val.

    Raises:
        DataError: for two archives of one split.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        ending = next((end for end in ENDINGS if path.name.lower().endswith(end)), None)
        role = ending and role_of(path.name[: -len(ending)])
        if role and path.is_file():
            if role in found:
                raise DataError(f"{root} has {found[role].name} and {path.name}: which is the split {role}?")
            found[role] = path
    return {role: found[role] for role in ROLES if role in found}


def _unpack_one(path: Path, into: Path) -> None:
    images = 0
    with tarfile.open(path) as archive:
        for number, member in enumerate(archive):
            name = PurePosixPath(member.name)
            if not member.isfile() or not name.name.lower().endswith(suffixes()) or name.name.startswith("."):
                continue
            folders = [part for part in name.parts[:-1] if part not in ("/", ".", "..")]
            folders = folders[:-1] if folders and folders[-1] == "images" else folders
            if not folders:
                raise DataError(f"{path}: {member.name} is in no class folder; {LAYOUT}")
            place = into / folders[-1] / f"{number:08d}-{name.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            if (content := archive.extractfile(member)) is not None:
                with content, place.open("wb") as file:
                    shutil.copyfileobj(content, file)
                images += 1
    if not images:
        raise DataError(f"{path} holds no image; {LAYOUT}")


class HubRows(NamedTuple):
    """The splits of a dataset of the hub, by their roles, and which columns are used.

    Args:
        name: of the dataset.
        splits: train, and val and test where there are.
        origin: what these are called there.
        image, label: columns; no label for images alone.
        names: of the classes, where the dataset has them.
    """

    name: str
    splits: dict[str, Any]
    origin: dict[str, str]
    image: str
    label: str | None
    names: list[str] | None


def open_hub(name: str, *, labels: bool = True) -> HubRows:
    """A dataset of the Hugging Face hub, `someone/pets` or `someone/pets?image=photo&label=breed`.

    Its first column of images is used, and its first of class labels, else one that is called as labels are and holds
    numbers or text.

    Raises:
        DataError: if it cannot be had, or is not of that kind.
    """
    name, _, query = name.partition("?")
    chosen = dict(parse_qsl(query))
    if strange := sorted(set(chosen) - {"image", "label"}):
        raise DataError(f"hf:{name}?{query}: {strange[0]} is none of image and label, the columns that can be chosen")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{name} needs the package datasets ({error}): pip install datasets") from None
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # no network, no such name, a script that is refused
        raise DataError(f"could not get {name} with datasets.load_dataset: {error}") from error
    found: dict[str, str] = {}
    for split in splits:
        if role := role_of(split):
            found.setdefault(role, split)
    if "train" not in found:
        raise DataError(f"{name} has the splits {', '.join(splits)}: it takes train")
    features = splits[found["train"]].features
    kinds = {column: type(kind).__name__ for column, kind in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    classes += [column for word in LABELS for column in kinds if column.lower() == word and column not in classes]
    image = chosen.get("image", images[0] if images else None)
    label = chosen.get("label", classes[0] if classes else None)
    if image not in kinds or (label not in kinds and (labels or "label" in chosen)):
        raise DataError(
            f"{name} has the columns {kinds}: it takes one Image and one ClassLabel, or a column of labels, which "
            f"hf:{name}?image=<column>&label=<column> chooses"
        )
    names = [str(word) for word in getattr(features[label], "names", None) or []] if label else None
    used = {role: splits[found[role]] for role in ROLES if role in found}
    return HubRows(name, used, found, str(image), label, names or None)


def from_hub(
    name: str, size: Size | None, fit: str = "crop", *, labels: bool = True
) -> tuple[tuple[str, ...], dict[str, tuple[Tensor, Tensor]], list[str]]:
    """The classes, (images, labels) of each split, and notes, of `open_hub`.

    Raises:
        DataError: if it cannot be had, is not of that kind, or an image cannot be read.
    """
    rows, notes = open_hub(name, labels=labels), list[str]()
    read = {role: _decoded(part, rows, f"{rows.name}/{role}", size, fit) for role, part in rows.splits.items()}
    if len({images.shape[1:] for images, _ in read.values()}) > 1:
        raise _differ(rows.name)
    if rows.label is None:
        splits = {role: (images, torch.zeros(len(images)).long()) for role, (images, _) in read.items()}
        return (), splits, [*_told(rows), f"{rows.name}: images without classes"]
    if rows.names is not None:
        classes, numbers = rows.names, {role: [int(str(v)) for v in values] for role, (_, values) in read.items()}
    else:
        classes, numbers = _classes_of(rows, {role: values for role, (_, values) in read.items()})
    if {"val", "test"} <= set(numbers) and set(numbers["test"]) == {-1}:
        notes.append(f"{rows.name}: the labels of {rows.origin['test']} are kept secret: it is not read")
        del numbers["test"], rows.origin["test"]
    return tuple(classes), {r: (read[r][0], torch.tensor(n)) for r, n in numbers.items()}, [*notes, *_told(rows)]


def _told(rows: HubRows) -> list[str]:
    """Notes on splits and columns."""
    held_out = [rows.origin[role] for role in ("val", "test") if role in rows.origin]
    if len(held_out) == 2:
        return [f"{rows.name}: {held_out[0]} decides which weights are best, {held_out[1]} is measured"]
    return [f"{rows.name}: {split} is the held-out split" for split in held_out]


def _classes_of(rows: HubRows, values: Mapping[str, list[object]]) -> tuple[list[str], dict[str, list[int]]]:
    """The classes of a column of numbers or text, and the index of each value in them."""
    classes = in_order({str(value) for value in values["train"]})
    strange = {str(value) for part in values.values() for value in part} - set(classes)
    if strange or len(classes) < 2 or any(value is None for part in values.values() for value in part):
        raise DataError(
            f"{rows.name}: the column {rows.label} must hold a label in each row, two classes or more, and those of "
            f"train alone: it has {len(classes)} in train" + (f", and {sorted(strange)[:3]} elsewhere" * bool(strange))
        )
    at = {name: i for i, name in enumerate(classes)}
    return classes, {role: [at[str(value)] for value in part] for role, part in values.items()}


def _differ(name: str) -> SizesDiffer:
    return SizesDiffer(f"the images of {name} differ in size: pass data.source_size to bring them to one")


def _decoded(
    rows: Iterable[Mapping[str, Any]], columns: HubRows, name: str, size: Size | None, fit: str
) -> tuple[Tensor, list[object]]:
    """Images uint8 (N, 3, H, W) of a split, and what stands in its column of labels."""
    images: list[np.ndarray] = []
    labels: list[object] = []
    for number, row in enumerate(rows):
        try:
            images.append(as_rgb(row[columns.image], size, fit)[0])
        except Exception as error:
            raise DataError(f"cannot read image {number} of {name}: {error}") from error
        if images[-1].shape != images[0].shape:
            raise _differ(columns.name)
        labels.append(None if columns.label is None else row[columns.label])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels
