"""What `vit2dpe tune` reaches without labels, of what a choice with labels reaches: top-1 at 1.5x, 2x and 3x the side.

    python recipes/tune_against_labels.py RUN --images data/train --test data/test --out runs/tune_against_labels

Settings are those that tune tried. It chooses on unlabelled images of training; with labels, the one of the best top-1
on half of the test images is chosen. Both are measured on the other half, and so is what the model does by itself. A
line of tune.csv for each size; one that is there is not measured again.

Claim, written down before: where the gain of the choice with labels exceeds two of its standard errors, the gain of
tune is at least 90% of it.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vit2dpe import load_run, sweep, tune
from vit2dpe.files import write_atomically
from vit2dpe.models.predict import prepared
from vit2dpe.resolution.sweep import train_size_of
from vit2dpe.spec import Size

COLUMNS = [
    "name",
    "epoch",
    "train_size",
    "size",
    "n_images",
    "n_test",
    "native_top1",
    "default_top1",
    "tuned_policy",
    "tuned_temperature",
    "tuned_top1",
    "labels_policy",
    "labels_temperature",
    "labels_top1",
    "labels_gain",
    "labels_error",
    "tuned_gain",
    "agreement_default",
    "agreement_tuned",
    "helps",
]


def files_of(folder: Path, count: int, seed: int) -> list[Path]:
    """`count` images of class folders, at any depth, drawn by seed."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return random.Random(seed).sample(found, min(count, len(found)))


def label_of(path: Path, classes: Sequence[str]) -> int:
    return next(classes.index(part.name) for part in path.parents if part.name in classes)


def batches(pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(pixels.split(50), labels.split(50), strict=True)


def measure(model: nn.Module, data: list[tuple[Tensor, Tensor]], size: Size, policy: str, temperature: str) -> Tensor:
    """(n,) whether each image is right."""
    right: list[Tensor] = []
    sweep(model, data, [size], [policy], temperatures=[temperature], right=right)
    return right[0].double()


def row(
    model: nn.Module, name: str, size: Size, images: Path, test: Path, n_images: int, n_test: int
) -> dict[str, object]:
    """The line of one size."""
    about = vars(model)["about"]
    own = train_size_of(model)
    prepare = prepared(about, own, own, about["mean"], about["std"])  # images have one size
    unlabelled = list(prepare(files_of(images, n_images, 0)).split(50))
    files = files_of(test, n_test, 1)
    labels = torch.tensor([label_of(path, about["classes"]) for path in files])
    data = list(batches(prepare(files), labels))
    found = tune(model, unlabelled, size)
    tried = list(dict.fromkeys((row.policy, row.temperature) for row in found.rows if row.half == "chosen on"))
    right = {words: measure(model, data, size, *words) for words in [("default", "none"), *tried]}
    half = torch.arange(len(files)) % 2 == 0
    best = max(right, key=lambda words: float(right[words][half].mean()))  # the first of equals
    told = {words: r[~half] for words, r in right.items()}
    default, tuned = told["default", "none"], told[found.policy, found.temperature]
    gain = told[best] - default
    agreement = {row.policy + row.temperature: row.agreement for row in found.rows if row.half == "told from"}
    top1 = 100 * torch.stack([default, tuned, told[best]]).mean(1)
    native = 100 * float(measure(model, data, own, "default", "none")[~half].mean())
    values = (
        name, (about.get("final") or {}).get("epoch"), own[0], size[0], n_images, len(default), native, float(top1[0]),
        found.policy, found.temperature, float(top1[1]), *best, float(top1[2]), 100 * float(gain.mean()),
        100 * float(gain.std()) / math.sqrt(len(gain)), 100 * float((tuned - default).mean()),
        agreement["defaultnone"], agreement[found.policy + found.temperature], found.helps,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sizes that tune.csv has no line of."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default=None, help="in the table; default the folder's")
    parser.add_argument("--images", type=Path, required=True, help="unlabelled ones")
    parser.add_argument("--test", type=Path, required=True, help="class folders")
    parser.add_argument("--out", type=Path, default=Path("runs/tune_against_labels"))
    parser.add_argument("--factors", default="1.5,2,3")
    parser.add_argument("--n-images", type=int, default=256)
    parser.add_argument("--n-test", type=int, default=1000)
    args = parser.parse_args(argv)
    path = args.out / "tune.csv"
    model, name = load_run(args.run), args.name or args.run.name
    for factor in map(float, args.factors.split(",")):
        size: Size = tuple(round(side * factor) for side in train_size_of(model))  # type: ignore[assignment]
        rows: list[dict[str, object]] = list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []
        if any((old["name"], old["size"]) == (name, str(size[0])) for old in rows):
            continue
        rows.append(row(model, name, size, args.images, args.test, args.n_images, args.n_test))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
