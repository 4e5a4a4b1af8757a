"""Trained models whose tables are exchanged for rotations and for biases over offsets, in 5% of their training.

    python recipes/swap_encodings.py <run> <images> [<run> <images> ...] --out runs/swap_encodings

A run is one of `vit2dpe train`, of which the images are `train` and `test` or `val`; labels are used for measuring
alone. Each is exchanged for each word with each seed, at the batch size of its training, and measured at its own size
and twice its sides. Written is `out/swap.csv`, a line for each of them and each size as it is done; what is done is not
run again, and what was stopped goes on.
"""

import argparse
import csv
import json
import math
from pathlib import Path

from vit2dpe.cli import main as vit2dpe
from vit2dpe.data.layout import list_folders
from vit2dpe.study.rows import read_rows
from vit2dpe.training.checkpoint import read_meta

SHARE = 0.05  # of the updates of the training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/swap_encodings"))
    parser.add_argument("--to", nargs="+", default=["rope", "relative"])
    parser.add_argument("--seeds", type=int, default=3)
    options, more = parser.parse_known_args()
    rows = []
    for seed in range(options.seeds):
        for run, images in zip(options.places[::2], options.places[1::2], strict=True):
            for word in options.to:
                out = options.out / f"{Path(run).name}-{word}-{seed}"
                rows += one(out, Path(run), images, word, seed, more)
                with (options.out / "swap.csv").open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)


def one(out: Path, run: Path, images: str, word: str, seed: int, more: list[str]) -> list[dict]:
    """An exchange, unless it is there, and what came of it."""
    kept = out / "rows.json"
    if not kept.is_file():
        meta = read_meta(run / "last")
        batch, trained, own = meta["optim"]["batch_size"], meta["state"]["step"], meta["train_size"]
        there = sum(map(len, list_folders(Path(images)).splits["train"].values()))
        updates = int(SHARE * trained)
        epochs = math.ceil(updates * batch / there)
        command = ["swap", "--init", str(run), "--to", word, "--data.root", images, "--run.seed", str(seed), "--resume"]
        command += ["--optim.batch_size", str(batch), "--optim.epochs", str(epochs), "--run.out", str(out)]
        command += ["--data.limit_train", str(updates // epochs * batch), "--data.limit_test", "1000000"]
        command += ["--measure", ",".join("x".join(str(by * side) for side in own) for by in (1, 2))]
        command += ["--optim.lr", "3e-3", "--policies", "default", *more]
        if status := vit2dpe(command):
            raise SystemExit(status)
        kept.write_text(json.dumps(list(lines(out, run.name, word, seed, trained))))
    return json.loads(kept.read_text())


def lines(out: Path, name: str, word: str, seed: int, trained: int):
    """A line for each size: top-1 of the old model, the exchanged one and the recovered one."""
    updates = read_meta(out / "last")["state"]["step"]
    rows = [row for row in read_rows(out / "swap.csv") if row.metric == "top1"]
    for size in dict.fromkeys(row.size for row in rows):
        at = {row.encoding.rpartition(" ")[2].strip("()"): row.value for row in rows if row.size == size}
        by = round(math.sqrt(size[0] * size[1] / (rows[0].train_height * rows[0].train_width)), 2)
        yield dict(model=name, to=word, seed=seed, updates=updates, trained=trained, by=by, n=int(rows[0].n)) | at


if __name__ == "__main__":
    main()
