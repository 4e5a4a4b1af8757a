"""Where images lie: class folders, in splits or not, or a tree of images without classes. Reads no image.

Nothing is guessed: what can be read in two ways is refused, and what is read in another way than
`root/train/<class>/*` is said in a note.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .folders import (
    HOW,
    Listing,
    by_class,
    check_classes,
    files_below,
    is_image,
    list_split,
    other_files,
    two_or_more,
    visible,
)

ROLES = {  # of a split, and the names of its folder, in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class Layout(NamedTuple):
    """Where images lie.

    Args:
        root: the folder that names are relative to.
        splits: train, and val and test where there are, the images of each class; the classes are those of train.
            Without labels the only class is "".
        notes: what was odd, a line each.
    """

    root: Path
    splits: dict[str, Listing]
    notes: list[str]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none for images alone."""
        return tuple(name for name in self.splits["train"] if name)

    @property
    def files(self) -> list[str]:
        return [name for listing in self.splits.values() for files in listing.values() for name in files]


def role_of(name: str) -> str | None:
    """The split that a name stands for, if it does."""
    return next((role for role, names in ROLES.items() if name.strip().lower() in names), None)


def list_folders(root: Path, *, labels: bool = True) -> Layout:
    """The images of class folders: in `root/train`, `root/val`, `root/test` (`ROLES` has their other names), or without
    splits in `root` itself.

    Tiny-ImageNet as it is downloaded is read too: `train/<class>/images/*`, `val/images/*` with val_annotations.txt. A
    folder whose only entry is a folder of class folders stands for that one.

    Args:
        labels: whether classes are needed. Where they are not and there are no class folders, all images below each
            split, or below `root`, are taken.

    Raises:
        DataError: for a folder that cannot be read that way, with counts.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; {HOW}")
    notes: list[str] = []
    try:
        return _labelled(_unwrapped(root, notes), notes)
    except DataError:
        if labels:
            raise
    return _images_alone(root)


def list_held_out(root: Path) -> tuple[Path, Listing, list[str]]:
    """The images of each class to evaluate on: of the split test, else of val, else of all class folders.

    Returns:
        the folder that the names are relative to, the names by class, and notes for the user.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; expected class folders, <folder>/<class>/<image>")
    notes: list[str] = []
    root = _unwrapped(root, notes)
    folders = find_splits(root, [])
    if "val" in folders and "test" in folders:
        secret = _without_classes(root / folders["test"])
        notes.append(
            f"{root} has {folders['val']} and {folders['test']}: {folders['val' if secret else 'test']} is used"
        )
        del folders["test" if secret else "val"]
    split = next((folders[role] for role in ("test", "val", "train") if role in folders), "")
    held_out = (root / split).resolve()
    listing = list_split(held_out.parent, held_out.name, notes)
    return held_out.parent, dict(sorted(listing.items())), notes


def _labelled(root: Path, notes: list[str]) -> Layout:
    folders = find_splits(root, notes)
    if not folders:
        return Layout(root, {"train": two_or_more(root, by_class(root, "", notes))}, notes)
    if "train" not in folders:
        raise DataError(f"there is no folder {root / 'train'} beside {', '.join(folders.values())}; {HOW}")
    splits = {"train": two_or_more(root / folders["train"], by_class(root, folders["train"], notes))}
    for role, folder in folders.items():
        if role == "train":
            continue
        if role == "test" and "val" in folders and _without_classes(root / folder):
            notes.append(f"{root / folder} has no class folders and is not read: {folders['val']} is measured")
            continue
        splits[role] = list_split(root, folder, notes)
        check_classes(root / folder, splits["train"], splits[role])
    if len(splits) == 3:
        notes.append(f"{root} has {folders['val']} and {folders['test']}: the first decides which weights are best")
    odd = [f"{folder} is read as {role}" for role, folder in folders.items() if role != folder and role in splits]
    if odd:
        notes.append(f"{root}: {', '.join(odd)}")
    return Layout(root, {role: splits[role] for role in ROLES if role in splits}, notes)


def find_splits(root: Path, notes: list[str]) -> dict[str, str]:
    """Split -> the name of its folder, under `root`; empty where there are class folders alone.

    A class may be called train, or test: a folder of such a name that holds no folders, beside others, is a class.

    Raises:
        DataError: for two folders of one split.
    """
    folders = [entry.name for entry in visible(root) if entry.is_dir()]
    named = [name for name in folders if role_of(name)]
    if len(named) < len(folders):
        named = [name for name in named if any(entry.is_dir() for entry in visible(root / name))]
    found: dict[str, str] = {}
    for role in ROLES:
        same = [name for name in named if role_of(name) == role]
        if len(same) > 1:
            raise DataError(f"{root} has {' and '.join(same)}: which is the split {role}? Rename or remove one of them")
        found |= {role: same[0]} if same else {}
    if found and (beside := [name for name in folders if name not in found.values()]):
        notes.append(f"folders beside the splits of {root}, not read: {', '.join(beside[:5])} ({len(beside)} in all)")
    return found


def _unwrapped(root: Path, notes: list[str]) -> Path:
    """The only folder in `root`, where that has folders of its own; else `root`."""
    entries = visible(root)
    folders = [entry for entry in entries if entry.is_dir()]
    if len(folders) != 1 or role_of(folders[0].name) or any(map(is_image, entries)):
        return root
    inner = Path(folders[0].path)
    if sum(entry.is_dir() for entry in visible(inner)) < 2:
        return root
    notes.append(f"read from {inner}, the only folder of {root}")
    return inner


def _without_classes(folder: Path) -> bool:
    """Whether a test split holds images alone, as Tiny-ImageNet's does, in test/images."""
    return all(entry.name == "images" for entry in visible(folder) if entry.is_dir())


def _images_alone(root: Path) -> Layout:
    """All images below `root`, or below each of its splits; of no class."""
    notes: list[str] = []
    folders = find_splits(root, notes)
    if "train" not in folders:
        folders, notes = {"train": ""}, []
    splits = {role: {"": files_below(root, folder)} for role, folder in folders.items()}
    for role, listing in splits.items():
        if not listing[""]:
            raise DataError(
                f"{root / folders[role]} holds no image that can be read{other_files(root / folders[role])}"
            )
    counts = ", ".join(f"{role} {len(listing[''])}" for role, listing in splits.items())
    return Layout(root, splits, [*notes, f"images without classes under {root}: {counts}"])
