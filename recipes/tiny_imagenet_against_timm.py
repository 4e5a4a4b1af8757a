"""Our ViT with `learned` positions and timm's own of the same shape, under one recipe and one training loop.

    python recipes/tiny_imagenet_against_timm.py <tiny-imagenet-50> --out runs/against_timm

Written is `out/against.csv`, a line for each model and seed as it is done; what is done is not run again. A seed draws
the weights and the order of the images. The two models draw other weights from the same seed.
"""

import argparse
import csv
import json
from pathlib import Path

from vit2dpe.cli import main as vit2dpe
from vit2dpe.training.log import read_table

RECIPE = Path(__file__).parent / "tiny_imagenet_vit_tiny.yaml"
MODELS = {"vit2dpe": [], "timm": ["--model.name", "vit_tiny_patch16_224", "--model.position", "null"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--out", type=Path, default=Path("runs/against_timm"))
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        for model, words in MODELS.items():  # in turns, so that what is there can always be compared
            run = options.out / f"{model}-{seed}"
            rows.append(one(run, model, seed, [*words, "--data.root", options.root]))
            with (options.out / "against.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def one(run: Path, model: str, seed: int, words: list[str]) -> dict:
    """A training, unless it is there, and what came of it."""
    kept = run / "against.json"
    if not kept.is_file():
        command = ["train", "--config", str(RECIPE), "--preset", "cpu", "--run.seed", str(seed), "--resume"]
        if status := vit2dpe([*command, "--run.out", str(run), *words]):
            raise SystemExit(status)
        last = read_table(run / "metrics.csv")[-1]
        row = dict(model=model, seed=seed, epochs=last["epoch"], updates=last["step"], train_loss=last["train_loss"])
        row |= {name: last[name] for name in ("test_top1", "test_top5", "test_loss")}
        kept.write_text(json.dumps(row | dict(cpu_s=round(last["cpu_seconds"]))))
    return json.loads(kept.read_text())


if __name__ == "__main__":
    main()
