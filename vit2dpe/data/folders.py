"""Lists the image files of class folders; reads no image.

An empty class, a class that only one split has, or images beside class folders are errors that name and count them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from ..errors import DataError
from .decode import suffixes

HOW = (
    "expected <root>/<class>/<image>, or <root>/train/<class>/<image> and beside it <root>/val/<class>/<image> "
    "(or test)"
)
ANNOTATIONS = "val_annotations.txt"
Listing = dict[str, list[str]]  # the images of each class


def list_split(root: Path, split: str, notes: list[str]) -> Listing:
    """The images of each class, in class folders or in Tiny-ImageNet's layout."""
    annotated = (root / split / ANNOTATIONS).is_file() and (root / split / "images").is_dir()
    return (_by_annotation if annotated else by_class)(root, split, notes)


def by_class(root: Path, split: str, notes: list[str]) -> Listing:
    entries = visible(root / split)
    folders = [entry for entry in entries if entry.is_dir()]
    if stray := [entry for entry in entries if not entry.is_dir() and is_image(entry)]:
        number = f"{len(stray)} image{'s' * (len(stray) > 1)}"
        if folders:
            raise DataError(
                f"the image {stray[0].path} is in no class folder: {number} beside {len(folders)} class folders; move "
                f"or delete them; {HOW}"
            )
        raise DataError(
            f"{root / split} holds {number} and no class folders ({stray[0].path} is in no class folder); {HOW}; or "
            "a CSV of paths and labels; vit2dpe pretrain takes images alone"
        )
    if not folders:
        raise DataError(f"{root / split} has no class folders{other_files(root / split)}; {HOW}")
    prefix = f"{split}/" if split else ""
    return {entry.name: _images_in(root, prefix + entry.name, notes) for entry in folders}


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


def _images_in(root: Path, folder: str, notes: list[str]) -> list[str]:
    """The images of a folder, as names relative to root."""
    entries = visible(root / folder)
    images = [f"{folder}/{entry.name}" for entry in entries if is_image(entry)]
    others = [entry for entry in entries if not is_image(entry)]
    deeper = [entry.name for entry in others if entry.is_dir()]
    if not images and len(deeper) == 1 and any(map(is_image, visible(root / folder / deeper[0]))):
        # Tiny-ImageNet, as it is downloaded, has a class's images one folder deeper, and so have others.
        if deeper != ["images"]:
            notes.append(f"images of {root / folder} are read from its only folder, {deeper[0]}")
        return _images_in(root, f"{folder}/{deeper[0]}", notes)
    if deeper:
        raise DataError(
            f"{root / folder} holds folders ({', '.join(deeper[:3])}), {len(deeper)} of them, beside {len(images)} "
            f"images: move images up; {HOW}"
        )
    if not images:
        raise DataError(
            f"{root / folder} holds no image that Pillow can open{other_files(root / folder)}; add some, or delete the "
            "folder"
        )
    if others:
        heic = sum(entry.name.lower().endswith((".heic", ".heif")) for entry in others)
        more = f" ({heic} of them .heic: they are read once pillow-heif is installed)" if heic else ""
        notes.append(f"files in {root / folder} that are no images by their name, ignored: {len(others)}{more}")
    return images


def files_below(root: Path, folder: str) -> list[str]:
    """The images of a folder and of all folders below it, as names relative to root."""
    files: list[str] = []
    for place, folders, names in os.walk(root / folder):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        inside = Path(place).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        files += [prefix + name for name in sorted(names) if not _hidden(name) and _ends_as_image(name)]
    return files


def check_classes(where: Path, train: Listing, held_out: Listing) -> None:
    """Refuse a held-out split of other classes than those of train."""
    strangers, missing = sorted(set(held_out) - set(train)), sorted(set(train) - set(held_out))
    if strangers:
        raise DataError(
            f"{where} has classes that train has not: {', '.join(strangers[:5])} ({len(strangers)} in all); "
            "add them to train or delete them"
        )
    if missing:
        raise DataError(
            f"{where} lacks classes of train: {', '.join(missing[:5])} ({len(missing)} in all); "
            "add images of them, or delete them from train"
        )


def two_or_more(where: Path, train: Listing) -> Listing:
    if len(train) < 2:
        name, files = next(iter(train.items()))
        raise DataError(
            f"{where} has one class ({name}) of {len(files)} image{'s' * (len(files) > 1)}: there must be two or more; "
            f"{HOW}"
        )
    return train


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, without hidden ones and those that archivers leave behind."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not _hidden(entry.name)]
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error}") from error
    return sorted(visible, key=lambda entry: entry.name)


def is_image(entry: os.DirEntry[str]) -> bool:
    return _ends_as_image(entry.name)


def _ends_as_image(name: str) -> bool:
    return name.lower().endswith(suffixes())


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def other_files(folder: Path) -> str:
    """The files of a folder that are no images, by suffix, for an error."""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in folder.rglob("*") if path.is_file())
    if not kinds:
        return ": it is empty"
    listed = ", ".join(f"{number} of {kind}" for kind, number in kinds.most_common(5))
    heic = "; .heic is read once pillow-heif is installed" if {".heic", ".heif"} & set(kinds) else ""
    return f": its files are {listed}{heic}"
