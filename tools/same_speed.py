"""Is a commit as fast as another? Two trees in two processes that take turns, and the ratio of their times.

    python tools/same_speed.py TREE_OF_BASE [TREE_OF_HEAD] [--pairs 41] [--only rope]

A tree is a checkout (`git worktree add DIR COMMIT`); HEAD is by default the one this file lies in. One thread each. A
pair is one step of BASE and one of HEAD, in alternating order, so that whatever else the machine does meets both. The
ratio is BASE / HEAD, above 1 where HEAD is faster: the median over pairs, and a 95% bootstrap interval of it.

Exit status: 1 if an interval ends below 0.99.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys, time, torch
torch.set_num_threads(1)
from vit2dpe import MAE, Swin, TextDecoder, ViT
torch.manual_seed(0)
SIZES = dict(img_size=224, patch_size=16, embed_dim=192, depth=4, num_heads=3, num_classes=10)
SWIN = dict(img_size=112, patch_size=4, window_size=7, embed_dim=48, depths=(2, 2), num_heads=(2, 4), num_classes=10)
images, text = torch.randn(4, 3, 224, 224), torch.randint(64, (4, 256))
def swin(): return Swin(**SWIN), (images[..., :112, :112],)
def decoder(): return TextDecoder("rope", vocab_size=64, context=256, embed_dim=192, depth=4, num_heads=3), (text,)
WORDS = ("none", "rope", "rope_mixed", "relative", "alibi")
MAKERS = {word: (lambda word=word: (ViT(word, **SIZES), (images,))) for word in WORDS}
MAKERS |= dict(swin=swin, text=decoder)
def step(model, inputs, training):
    if not training:
        with torch.no_grad():
            return model(*inputs)
    model.zero_grad()
    model(*inputs).square().mean().backward()
ready = {}
for line in sys.stdin:
    name, _, mode = line.strip().partition(" ")
    if name not in ready:
        ready[name] = MAKERS[name]()
        for training in (False, True):
            step(ready[name][0].train(training), ready[name][1], training)
    training = mode == "training"
    model = ready[name][0].train(training)
    start = time.perf_counter()
    step(model, ready[name][1], training)
    print(time.perf_counter() - start, flush=True)
"""
NAMES = ("none", "rope", "rope_mixed", "relative", "alibi", "swin", "text")


def worker(tree: Path) -> subprocess.Popen[str]:
    """A process that times one step of `name mode` for each line it reads."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd="/")


def seconds(process: subprocess.Popen[str], what: str) -> float:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the worker was started without pipes")
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the worker died at {what!r}")
    return float(line)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--only", default=",".join(NAMES))
    options = parser.parse_args()
    base, head = (worker(tree.resolve()) for tree in (options.base, options.head))
    slower = 0
    for name in options.only.split(","):
        for mode in ("inference", "training"):
            what, ratios = f"{name} {mode}", []
            seconds(base, what), seconds(head, what)  # both are built and warm
            for pair in range(options.pairs):
                first, second = (base, head) if pair % 2 else (head, base)
                times = {id(first): seconds(first, what), id(second): seconds(second, what)}
                ratios.append(times[id(base)] / times[id(head)])
            low, high = interval(ratios)
            slower += high < 0.99
            print(f"{what:22} {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]", flush=True)
    for process in (base, head):
        process.kill()
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
