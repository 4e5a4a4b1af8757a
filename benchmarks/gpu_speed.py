"""Times of whole steps on a GPU: ours, timm's model of the same kind, and no encoding, interleaved; one row a group.

    python -m benchmarks.gpu_speed --out runs/gpu/speed.jsonl [--device cuda] [--seconds 180] [--small]

bfloat16 autocast, forward and backward (`training`) or forward alone, in eager mode, as a CUDA graph, or compiled.
Times are between events of the stream; ratios are taken within a repetition, with an interval. Rows that the file holds
are not measured again. That ours computes what timm computes is proved by `vit2dpe bench` and by the parity tests;
weights are random here, and those of the two sides differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from benchmarks.gpu_checks import about, capture, loss_of
from benchmarks.measure import interleaved, interval
from benchmarks.resumable import Fact, Rows
from vit2dpe import ViT


class Shape(NamedTuple):
    """A model and its batch."""

    batch: int
    size: int
    patch: int
    width: int
    heads: int
    depth: int


SHAPES = {
    "Ti/4@32 B512": Shape(512, 32, 4, 192, 3, 12),
    "S/16@224 B256": Shape(256, 224, 16, 384, 6, 12),
    "Ti/4@32 B128": Shape(128, 32, 4, 192, 3, 12),
    "S/16@512 B32": Shape(32, 512, 16, 384, 6, 12),
    "S/16@1024 B4": Shape(4, 1024, 16, 384, 6, 12),  # 4,097 tokens: biases beside the logits, tables by slices
}
SMALL = {"tiny B2": Shape(2, 32, 8, 32, 2, 1)}
PEERS = {
    "rope": "vit_small_patch16_rope_224",
    "learned": "vit_small_patch16_224",
    "relative": "vit_relpos_small_patch16_224",
    "rope_mixed": "vit_small_patch16_rope_mixed_224",
    "alibi": None,
    "lookhere": None,
}


def contenders(encoding: str, shape: Shape) -> dict[str, nn.Module]:
    """{"peer" (if there is one), "ours", "none"}"""
    torch.manual_seed(0)

    def ours(word: str) -> nn.Module:
        return ViT(
            word, img_size=shape.size, patch_size=shape.patch, embed_dim=shape.width, num_heads=shape.heads,
            depth=shape.depth, num_classes=10,
        )  # fmt: skip

    models = {"ours": ours(encoding), "none": ours("none")}
    if peer := PEERS[encoding]:
        models["peer"] = timm.create_model(
            peer, img_size=shape.size, patch_size=shape.patch, embed_dim=shape.width, num_heads=shape.heads,
            depth=shape.depth, num_classes=10, **({"rel_pos_type": "bias"} if "relpos" in peer else {}),
        )  # fmt: skip
    return models


def step_of(model: nn.Module, images: Tensor, labels: Tensor, training: bool, how: str) -> Callable[[], object]:
    """What is timed: a forward, or forward and backward; warm."""
    forward: nn.Module = torch.compile(model) if how == "compiled" else model  # type: ignore[assignment]

    def train() -> None:
        loss_of(forward, images, labels, half=True).backward()
        model.zero_grad(set_to_none=True)

    def infer() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            forward(images)

    if how == "graph":
        return capture(model, partial(loss_of, model, images, labels, half=True, cached=False))[0]
    return train if training else infer


def measured(encoding: str, shape: Shape, training: bool, how: str, device: str, repeats: int) -> dict[str, Fact]:
    """Milliseconds, images a second, memory and time to the first steps of every contender, and their ratios."""
    cuda = device.startswith("cuda")
    images = torch.randn(shape.batch, 3, shape.size, shape.size, device=device)
    labels = torch.zeros(shape.batch, dtype=torch.long, device=device)
    facts: dict[str, dict[str, Fact]] = {}
    ratios: dict[str, Fact] = {}
    steps: dict[str, Callable[[], object]] = {}
    for kind, model in contenders(encoding, shape).items():
        began = time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        steps[kind] = step_of(model.to(device).train(training), images, labels, training, how)
        for _ in range(min(8, repeats)):
            steps[kind]()
        seen: dict[str, Fact] = {}
        if cuda:
            torch.cuda.synchronize()
            seen["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        facts[kind] = seen | dict(first_s=round(time.perf_counter() - began, 2))
    seconds = interleaved(steps, repeats, device)
    for kind, times in seconds.items():
        middle = statistics.median(times)
        facts[kind] |= dict(ms=round(1e3 * middle, 3), images_per_s=round(shape.batch / middle))
    for a, b in (("peer", "ours"), ("ours", "none")):
        if a in seconds:
            within = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
            ratios[f"{a}_{b}"] = [round(x, 4) for x in interval(within)]
    return facts | ratios


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--small", action="store_true", help="one tiny model, two encodings, three repetitions")
    config = parser.parse_args(args)
    warnings.simplefilter("ignore")
    cuda = config.device.startswith("cuda")
    rows = Rows(config.out, config.seconds)
    rows.once("about", partial(about, config.device))
    shapes, encodings = (SMALL, ("rope", "learned")) if config.small else (SHAPES, tuple(PEERS))
    ways = [("eager", "training"), ("eager", "inference")]
    ways += [("graph", "training")] if cuda else []
    ways += [] if config.small else [("compiled", "training")]
    for how, mode in ways:
        for name, shape in shapes.items():
            for encoding in encodings:
                if how != "eager" and encoding not in ("rope", "relative"):
                    continue
                run = partial(measured, encoding, shape, mode == "training", how, config.device)
                rows.once(f"{name} {encoding} {mode} {how}", partial(run, repeats=3 if config.small else 20))
                if cuda:
                    torch.cuda.empty_cache()
    print(f"{len(rows.rows) - 1} rows; {len(rows.left_out)} for another run")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
