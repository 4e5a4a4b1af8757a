"""Reads images from one tar file a split, and from datasets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import cache_dir
from ..spec import Size
from .decode import as_rgb
from .image_cache import SUFFIXES

SPLITS = ("train", "val", "test")
ENDINGS = (".tar", ".tar.gz", ".tgz")
LAYOUT = "expected <root>/train.tar and <root>/val.tar (or test; .tar.gz, .tgz too), in each <class>/<image>"


def unpack(root: Path, *, alone: bool = False) -> Path:
    """Unpack `root/train.tar` and `root/val.tar` into class folders in the cache, once for each state of the files.

    A member's class is the folder that it lies in (the one above, where that is called images, as in Tiny-ImageNet).
    Only the last parts of a member's path are used: none is written outside; links and devices are left out.

    Args:
        alone: whether train may be the only split.

    Raises:
        DataError: for a missing or damaged archive.
    """
    archives = {split: path for split in SPLITS for end in ENDINGS if (path := root / f"{split}{end}").is_file()}
    if "train" not in archives or (len(archives) < 2 and not alone):
        raise DataError(
            f"{root} holds {', '.join(p.name for p in archives.values()) or 'no archive of a split'}; {LAYOUT}; with "
            "train alone --data.val_fraction 0.1 holds out a tenth of it"
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


def _unpack_one(path: Path, into: Path) -> None:
    images = 0
    with tarfile.open(path) as archive:
        for number, member in enumerate(archive):
            name = PurePosixPath(member.name)
            if not member.isfile() or not name.name.lower().endswith(SUFFIXES) or name.name.startswith("."):
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


def from_hub(
    name: str, size: Size | None
) -> tuple[tuple[str, ...], tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    """A dataset of the Hugging Face hub: classes, (images, labels) of train and of the held-out split, notes.

    Its first column of images and its first of class labels are used; validation is preferred to test.

    Raises:
        DataError: if it cannot be had, or is not of that kind.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"hf:{name} needs the package datasets ({error}): pip install datasets") from None
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # no network, no such name, a script that is refused
        raise DataError(f"could not get {name} with datasets.load_dataset: {error}") from error
    held_out = next((split for split in ("validation", "valid", "val", "test") if split in splits), None)
    if "train" not in splits or held_out is None:
        raise DataError(f"{name} has the splits {', '.join(splits)}: it takes train and validation or test")
    kinds = {column: type(kind).__name__ for column, kind in splits["train"].features.items()}
    image = next((column for column, kind in kinds.items() if kind == "Image"), None)
    label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
    if image is None or label is None:
        raise DataError(f"{name} has the columns {kinds}: it takes one Image and one ClassLabel")
    parts = [_decoded(splits[split], image, label, f"{name}/{split}", size) for split in ("train", held_out)]
    classes = tuple(map(str, splits["train"].features[label].names))
    return classes, parts[0], parts[1], [f"{name}: {held_out} is the held-out split"]


def _decoded(
    rows: Iterable[Mapping[str, Any]], image: str, label: str, name: str, size: Size | None
) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for number, row in enumerate(rows):
        try:
            images.append(as_rgb(row[image], size)[0])
        except Exception as error:
            raise DataError(f"cannot read image {number} of {name}: {error}") from error
        if images[-1].shape != images[0].shape:
            raise DataError(f"the images of {name} differ in size: pass data.source_size to bring them to one")
        labels.append(int(row[label]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
