"""Lists the image files of class folders; reads no image.

Nothing is guessed: a missing split, an empty class or a class that only one split has is an error that names it.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ..errors import DataError
from .image_cache import SUFFIXES

LAYOUT = "expected <root>/train/<class>/<image> and <root>/val/<class>/<image> (or test)"
ANNOTATIONS = "val_annotations.txt"
Listing = dict[str, list[str]]


def list_folders(root: Path, *, alone: bool = False) -> tuple[Listing, Listing, list[str]]:
    """For train and the held-out split, the images of each class as names relative to root; and notes for the user.

    Tiny-ImageNet as it is downloaded is read too: `train/<class>/images/*`, `val/images/*` with val_annotations.txt.

    Args:
        alone: whether train may be the only split; the other one is empty then.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; {LAYOUT}")
    splits = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    if "train" not in splits:
        raise DataError(f"there is no folder {root / 'train'}; {LAYOUT}")
    if len(splits) == 1 and not alone:
        raise DataError(
            f"{root} has neither val nor test: nothing to measure on; --data.val_fraction 0.1 holds out a tenth of "
            f"train, or move some images of every class out of it; {LAYOUT}"
        )
    notes = [f"{root} has both val and test: val is used"] if len(splits) == 3 else []
    train = _by_class(root, "train", notes)
    if len(splits) == 1:
        return _two_or_more(root, train), {}, notes
    test = _list_split(root, splits[1], notes)
    _match(root, train, splits[1], test)
    return train, test, notes


def list_held_out(root: Path) -> tuple[Path, Listing, list[str]]:
    """The images of each class to evaluate on: of `root/val` or `root/test`, else of `root` itself.

    Returns:
        the folder that the names are relative to, the names by class, and notes for the user.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; expected class folders, <folder>/<class>/<image>")
    held_out = next((root / split for split in ("val", "test") if (root / split).is_dir()), root).resolve()
    notes: list[str] = []
    return held_out.parent, dict(sorted(_list_split(held_out.parent, held_out.name, notes).items())), notes


def _list_split(root: Path, split: str, notes: list[str]) -> Listing:
    """The images of each class, in class folders or in Tiny-ImageNet's layout."""
    annotated = (root / split / ANNOTATIONS).is_file() and (root / split / "images").is_dir()
    return (_by_annotation if annotated else _by_class)(root, split, notes)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without hidden ones and those that archivers leave behind."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error}") from error
    return sorted(visible, key=lambda entry: entry.name)


def _images_in(root: Path, folder: str, notes: list[str]) -> list[str]:
    """The images of a folder, as names relative to root."""
    entries = _visible(root / folder)
    images = [f"{folder}/{entry.name}" for entry in entries if entry.name.lower().endswith(SUFFIXES)]
    others = [entry for entry in entries if not entry.name.lower().endswith(SUFFIXES)]
    if deeper := [entry.name for entry in others if entry.is_dir()]:
        raise DataError(f"{root / folder} holds folders ({', '.join(deeper[:3])}): move images up; {LAYOUT}")
    if not images:
        raise DataError(f"{root / folder} holds no image ({' '.join(SUFFIXES)}): add some, or delete the folder")
    if others:
        notes.append(f"files in {root / folder} that are no images by their name, ignored: {len(others)}")
    return images


def _by_class(root: Path, split: str, notes: list[str]) -> Listing:
    listing = {}
    for entry in _visible(root / split):
        if entry.is_dir():
            # Tiny-ImageNet, as it is downloaded, has a class's images one folder deeper.
            deeper = "/images" if Path(entry, "images").is_dir() else ""
            listing[entry.name] = _images_in(root, f"{split}/{entry.name}{deeper}", notes)
        elif entry.name.lower().endswith(SUFFIXES):
            raise DataError(f"the image {entry.path} is in no class folder; {LAYOUT}")
    if not listing:
        raise DataError(f"{root / split} has no class folders; {LAYOUT}")
    return listing


def _by_annotation(root: Path, split: str, notes: list[str]) -> Listing:
    """Tiny-ImageNet's val: lines of file name, class, box; separated by tabs."""
    annotations = root / split / ANNOTATIONS
    listing: Listing = {}
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        file, _, rest = line.partition("\t")
        if not rest:
            raise DataError(f"{annotations}, line {number}: expected <file> <tab> <class>, got {line!r}")
        listing.setdefault(rest.split("\t")[0], []).append(f"{split}/images/{file}")
    named = Counter(name for files in listing.values() for name in files)
    present = Counter(_images_in(root, f"{split}/images", notes))
    if odd := sorted((named - present) + (present - named)):
        raise DataError(f"{annotations} and {root / split / 'images'} must name the same files, once each: {odd[:3]}")
    return listing


def _match(root: Path, train: Listing, held_out: str, test: Listing) -> None:
    _two_or_more(root, train)
    strangers, missing = sorted(set(test) - set(train)), sorted(set(train) - set(test))
    if strangers:
        raise DataError(
            f"{root / held_out} has classes that train has not: {', '.join(strangers[:5])} ({len(strangers)} in all); "
            "add them to train or delete them"
        )
    if missing:
        raise DataError(
            f"{root / held_out} lacks classes of train: {', '.join(missing[:5])} ({len(missing)} in all); "
            "add images of them, or delete them from train"
        )


def _two_or_more(root: Path, train: Listing) -> Listing:
    if len(train) < 2:
        raise DataError(f"{root / 'train'} has one class ({', '.join(train)}): there must be two or more; {LAYOUT}")
    return train
