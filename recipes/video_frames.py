"""Which digit came first? Trained on videos of 8 frames, tested at 8, 16 and 32.

    python recipes/video_frames.py --out runs/video_frames

A video shows one handwritten digit of scikit-learn (8x8 pixels) and then another one, as long as it lasts; the class is
the first of them. What has no order in time sees both, and is right half of the time. With more frames both digits are
shown for longer, so that a time counted in frames, and not in parts of the video, leaves what was trained. They change
after a quarter, a half or three quarters, between two tubelets: one that held both would show which comes first.
Digits of training and of test are different ones; noise is drawn for every frame.

Each encoding trains a micro ViT of 2x4x4-pixel tubelets (16 tokens) with each seed, and is measured under each policy
that it can take. Written is `out/frames.csv`, a line for each policy and number of frames; what is there is not run
again.

Claims, written down before the run, after trials of `t5`, `rope` and `none` in which digits changed anywhere (t is the
training length):

1. `none` and `alibi`, which give a video run backwards the same, stay below 60% at t.
2. `t5`, whose offsets have a sign, keeps at 4 t at least as much as `learned`, whose table is resized.
3. `rope` keeps at 4 t at least as much interpolated as extrapolated.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from vit2dpe import ViT, use_policy
from vit2dpe.files import write_atomically
from vit2dpe.resolution.apply import policies_of
from vit2dpe.seeding import derive_seed, generator
from vit2dpe.training.run_folder import environment

ENCODINGS = "none,alibi,learned,sincos,t5,rope"
COLUMNS = ["encoding", "policy", "seed", "train_frames", "frames", "top1", "loss", "n", "cpu_seconds"]
TRAIN_DIGITS, FRAMES, TIMES = 1297, 8, (1, 2, 4)
NOISE = 0.1  # standard deviation, of pixels in [0, 1]


@cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """(n, 8, 8) in [0, 1] and labels, in an order drawn once."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=generator(0, "split"))
    index = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    return torch.tensor(data.images)[index].float() / 16, torch.tensor(data.target)[index]


def videos(split: str, count: int, frames: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """(count, 1, frames, 8, 8) and the class of the digit that came first; a pure function of its arguments.

    Of another number of frames they are the same videos, but for the noise.
    """
    images, labels = digits(split)
    draw = generator(split, *key)
    first, second = (torch.randint(len(images), (count,), generator=draw) for _ in range(2))
    share = torch.randint(1, 4, (count, 1), generator=draw) / 4  # of the video that the first one lasts
    noise = NOISE * torch.randn(count, frames, 8, 8, generator=generator(split, *key, "noise", frames))
    early = (torch.arange(frames) + 0.5) / frames < share  # (count, frames)
    shown = torch.where(early[..., None, None], images[first][:, None], images[second][:, None])
    return (shown + noise)[:, None], labels[first]


def trained(word: str, seed: int, steps: int, batch: int) -> ViT:
    """A micro ViT, trained on videos that are drawn for every step."""
    torch.manual_seed(derive_seed(seed, "model"))
    sizes = dict(embed_dim=48, depth=2, num_heads=3, in_chans=1, num_classes=10)
    model = ViT(word, img_size=(FRAMES, 8, 8), patch_size=(2, 4, 4), global_pool="avg", class_token=False, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = 3e-3 * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        x, y = videos("train", batch, FRAMES, seed, step)
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def measured(model: ViT, frames: int, policy: str, n: int) -> tuple[float, float]:
    """Top-1 in percent and loss in nats, of n test videos that are the same for all."""
    x, y = videos("test", n, frames, 0)
    with use_policy(model, policy):
        logits = torch.cat([model(part) for part in x.split(250)])
    return 100 * float((logits.argmax(1) == y).float().mean()), float(F.cross_entropy(logits, y))


def cell(word: str, seed: int, steps: int, batch: int, n: int) -> list[dict[str, object]]:
    """The lines of one model."""
    start = time.process_time()
    model = trained(word, seed, steps, batch)
    seconds = round(time.process_time() - start, 1)
    rows = []
    for policy in policies_of(model):
        for times in TIMES:
            top1, loss = measured(model, times * FRAMES, policy, n)
            values = (word, policy, seed, FRAMES, times * FRAMES, round(top1, 3), round(loss, 5), n, seconds)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the models that frames.csv has no line of, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/video_frames"))
    parser.add_argument("--encodings", default=ENCODINGS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--n", type=int, default=1000, help="test videos")
    options = parser.parse_args(argv)
    path = options.out / "frames.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(b"".join(images.numpy().tobytes() for images, _ in map(digits, ("train", "test"))))
    command = f"python recipes/video_frames.py --seeds {options.seeds} --steps {options.steps}"
    about = environment(command, torch.device("cpu"), "digits", digest.hexdigest())
    write_atomically(options.out / "env.json", json.dumps(about, indent=1).encode())
    for seed in range(options.seeds):
        for word in options.encodings.split(","):
            rows: list[dict[str, object]] = (
                list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []
            )
            if any((row["encoding"], str(row["seed"])) == (word, str(seed)) for row in rows):
                continue
            rows += cell(word, seed, options.steps, options.batch, options.n)
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(path, text.getvalue().encode())
            print(word, seed, rows[-1]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
