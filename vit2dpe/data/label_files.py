"""Reads a CSV of paths and labels: which image is of which class, and of which split. Reads no image.

file,label,split          a header; columns in any order, separated by commas, semicolons or tabs
dogs/1.jpg,dog,train      paths are relative to the folder of the CSV
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from ..errors import DataError
from .layout import ROLES, Layout, role_of

PATHS = ("path", "file", "filename", "image", "filepath", "file_name", "image_path")
LABELS = ("label", "class", "target", "category")
SPLITS = ("split", "set", "subset", "fold")
HOW = f"expected a header with a column of paths ({', '.join(PATHS[:4])}) and one of labels ({', '.join(LABELS)})"


def list_csv(file: Path, *, labels: bool = True) -> Layout:
    """The images of a CSV, by split and class; whole numbers as labels are classes in the order of the numbers.

    Args:
        labels: whether labels are needed; where they are not, a file without them is of no class.

    Raises:
        DataError: naming the file and the line.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file}; {HOW}")
    lines, columns = _read(file)
    path, label, split = (_column(columns, names) for names in (PATHS, LABELS, SPLITS))
    if path is None or (label is None and labels):
        raise DataError(f"{file} has the columns {', '.join(columns)}: {HOW}")
    found: dict[str, tuple[int, str, str]] = {}  # image -> line, split, class
    missing: list[tuple[int, str]] = []
    for number, line in lines:
        name, of = line[path].strip(), "" if label is None else line[label].strip()
        role = "train" if split is None else role_of(line[split]) or ""
        if not name or (label is not None and not of):
            raise DataError(f"{file}, line {number}: no {'label' if name else 'path'} in {','.join(line)!r}")
        if not role and split is not None:
            known = ", ".join(name for names in ROLES.values() for name in names)
            raise DataError(f"{file}, line {number}: {columns[split]} is one of {known}, got {line[split]!r}")
        name = os.path.relpath(name, file.parent) if os.path.isabs(name) else name
        before = found.setdefault(name, (number, role, of))
        if before[1:] != (role, of):
            raise DataError(f"{file}, line {number}: {name} is in line {before[0]} too, with another label or split")
        if not (file.parent / name).is_file():
            missing.append((number, name))
    if missing:
        number, name = missing[0]
        raise DataError(
            f"{file}, line {number}: there is no file {file.parent / name}; {len(missing)} of {len(lines)} "
            "are missing; paths are relative to the folder of the CSV"
        )
    classes = in_order({of for _, _, of in found.values()})
    splits = {role: {of: [n for n, at in found.items() if at[1:] == (role, of)] for of in classes} for role in ROLES}
    splits = {role: listing for role, listing in splits.items() if any(listing.values())}
    _check(file, splits, classes)
    used = [
        f"{columns[column]} holds the {what}"
        for column, what in ((path, "paths"), (label, "labels"))
        if column is not None
    ]
    notes = (
        [f"{file.name}: {', '.join(used)}"] if {*PATHS[:1], *LABELS[:1]} - {c.strip().lower() for c in columns} else []
    )
    if len(found) < len(lines):
        notes.append(f"{file.name}: images that stand in it twice, read once: {len(lines) - len(found)}")
    return Layout(file.parent, splits, notes)


def _read(file: Path) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """The lines of a table with their numbers, and its header."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            head = opened.readline()
            opened.seek(0)
            reader = csv.reader(opened, delimiter=max(",;\t", key=head.count))
            columns = next(reader, [])
            lines = [(reader.line_num, line) for line in reader if any(map(str.strip, line))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a CSV: {error}") from None
    for number, line in lines:
        if len(line) != len(columns):
            raise DataError(
                f"{file}, line {number}: {len(line)} values, the header has {len(columns)}: {','.join(line)!r}"
            )
    if not lines:
        raise DataError(f"{file} has no lines of images; {HOW}")
    return lines, columns


def _column(columns: list[str], names: tuple[str, ...]) -> int | None:
    """The column of one of these names, the first name first."""
    plain = [column.strip().lower() for column in columns]
    return next((plain.index(name) for name in names if name in plain), None)


def in_order(classes: set[str]) -> list[str]:
    """Classes by name; whole numbers by number."""
    try:
        return sorted(classes, key=int)
    except ValueError:
        return sorted(classes)


def _check(file: Path, splits: dict[str, dict[str, list[str]]], classes: list[str]) -> None:
    """Refuse a missing split, one class, and classes that a split does not have."""
    if "train" not in splits:
        raise DataError(f"{file} has no image of the split train: its splits are {', '.join(splits)}")
    if classes == [""]:
        return
    if len(classes) < 2:
        count = sum(len(files) for listing in splits.values() for files in listing.values())
        raise DataError(f"{file} has one class ({classes[0]}) of {count} images: there must be two or more")
    for role, listing in splits.items():
        if lacking := [name for name, files in listing.items() if not files]:
            raise DataError(
                f"{file}: its split {role} has no image of {', '.join(lacking[:5])} ({len(lacking)} classes in all)"
            )
