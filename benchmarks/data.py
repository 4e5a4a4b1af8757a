"""How many images a second the data path gives, without a model: out of memory, and decoded from files by workers.

    python benchmarks/data.py --root <folder with train/ and val/ or test/> [--size 32] [--batches 40] [--workers 1]

Wall time says what this machine gives now; CPU time, of this process and its workers together, what one core would give
if it did nothing else. Both are printed, with the machine's load.
"""

import argparse
import os
import resource
import time

import torch

from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.spec import parse_size, parse_term
from vit2dpe.training.run_folder import processor
from vit2dpe.training.tasks.classification import ImageTask

AUGMENTATIONS = {
    "none": AugmentConfig(0, False),
    "shift and flip": AugmentConfig(4, True),
    "resized crop and flip": AugmentConfig(0, True, 0.25),
    "shift, flip, RandAugment(2, 9), erasing, mixup, cutmix": AugmentConfig(
        4, True, policy=parse_term("rand(ops=2, magnitude=9)"), erase=0.25, mixup=0.8, cutmix=1.0
    ),
}


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(task: ImageTask, batches: int) -> tuple[float, float]:
    """(images per second of wall time, images per second of CPU time)."""
    steps = task.steps_per_epoch
    task.batch(0, 0)
    task.close()  # workers count when they have ended: they begin and end within what is measured
    wall, cpu, n = time.perf_counter(), cpu_seconds(), 0
    for i in range(batches):
        n += len(task.batch(*divmod(i, steps))["images"])
    wall = time.perf_counter() - wall
    task.close()
    return n / wall, n / (cpu_seconds() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", required=True, help="class folders")
    parser.add_argument("--size", default="32", help="of the images, 32 or 32x48")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, default=10_000, help="training images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = parse_size(args.size)
    print(f"{processor()}, one thread, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}; {size[0]}x{size[1]}")
    print("| images | augmentation | images/s, wall | images/s, CPU time |\n|---|---|---:|---:|")
    for cache, name in (("memory", "in memory"), ("none", f"files, {args.workers} worker")):
        data = load_images("folder", args.root, source_size=size, limit_train=args.limit, limit_test=100, cache=cache)
        for said, augment in AUGMENTATIONS.items():
            task = ImageTask(data, size, args.batch_size, augment=augment, workers=args.workers)
            wall, cpu = measure(task, args.batches)
            print(f"| {name} | {said} | {wall:,.0f} | {cpu:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
