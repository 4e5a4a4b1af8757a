"""Compare two folders of runs bit for bit, for `same_numbers.sh`: tables (.csv) and weights (.safetensors).

    python tools/same_numbers.py BASE HEAD

A file of HEAD belongs to the one of BASE at the same place, where the digest that ends the name of a study's cell does
not count: it is of the cell's settings, and a new setting changes it. Of tables the columns that BASE has are compared,
as they are written, but for what a clock or the memory says. Of weights every tensor is compared: name, dtype, shape
and bits. Exit status: 0 equal, 1 different.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

MEASURED = re.compile(r"(cpu_)?seconds|waiting|\w+_per_s|memory_gib")  # differ between two runs of the same code
CELL = re.compile(r"-[0-9a-f]{8}(?=/)")


def files_of(folder: Path) -> dict[str, Path]:
    """Tables and weights by their place in `folder`; not a cell's sweep, whose rows are in the study's results.csv."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".csv", ".safetensors") and not path.name.startswith("sweep-"):
            place = CELL.sub("", path.relative_to(folder).as_posix())
            if place in found:
                raise SystemExit(f"{path} and {found[place]} differ in their digests alone: run one of them")
            found[place] = path
    return found


def differs_as_table(base: Path, head: Path) -> str | None:
    """The first difference of two tables, None where there is none."""
    with base.open(newline="") as a, head.open(newline="") as b:
        old, new = csv.DictReader(a), csv.DictReader(b)
        names = [name for name in old.fieldnames or () if not MEASURED.fullmatch(name)]
        if not names:
            return "BASE's has no columns"
        if lost := [name for name in names if name not in (new.fieldnames or ())]:
            return f"without the column {lost[0]}"
        before, after = list(old), list(new)
    if not before:
        return "BASE's has no rows"
    for i, (row, other) in enumerate(zip(before, after, strict=False), start=1):
        for name in names:
            if row[name] != other[name]:
                return f"row {i} ({names[0]} {row[names[0]]}), {name}: {row[name]} became {other[name]}"
    return None if len(before) == len(after) else f"{len(before)} rows became {len(after)}"


def differs_as_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    """The first difference of two sets of tensors, by name, and how many more there are; None where there is none."""
    if not before:
        return "BASE's has no tensors"
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after or name not in before:
            found.append(f"tensor {name} is only in {'BASE' if name in before else 'HEAD'}")
        elif why := differs_as_tensor(before[name], after[name]):
            found.append(f"tensor {name}: {why}")
    return (found[0] + f"; {len(found) - 1} more of {len(before)} differ" * (len(found) > 1)) if found else None


def differs_as_tensor(before: Tensor, after: Tensor) -> str | None:
    for what in ("dtype", "shape"):
        if getattr(before, what) != getattr(after, what):
            return f"{what} {getattr(before, what)} became {getattr(after, what)}"
    old, new = before.reshape(-1), after.reshape(-1)
    # Bytes, not values: -0 is another number than 0 here, and the same NaN is the same.
    unlike = (old.view(torch.uint8) != new.view(torch.uint8)).nonzero().flatten() // old.element_size()
    unlike = unlike.unique()
    if not len(unlike):
        return None
    first = int(unlike[0])
    return f"{len(unlike)} of {len(old)} elements, first number {first}: {old[first].item()} became {new[first].item()}"


def main(base: Path, head: Path) -> int:
    old, new = files_of(base), files_of(head)
    tensors, differences = 0, 0
    for place in sorted(old.keys() | new.keys()):
        if place not in new or place not in old:
            why: str | None = f"is only in {'BASE' if place in old else 'HEAD'}"
        elif place.endswith(".csv"):
            why = differs_as_table(old[place], new[place])
        else:
            before = load_file(old[place])
            tensors += len(before)
            why = differs_as_weights(before, load_file(new[place]))
        if why:
            differences += 1
            print(f"{place}: {why}")
    if differences or not tensors:
        print(f"different: {differences} of {len(old)} files")
        return 1
    print(f"equal: {len(old)} files, {tensors} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
