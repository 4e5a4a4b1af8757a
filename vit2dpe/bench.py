"""`vit2dpe bench`: ours, timm's model of the same function, and the same model with no encoding, in one process.

Each row first proves that ours computes what the peer computes (`from_timm`: same weights, same logits); a row that
fails prints no ratio. Then the three run in shuffled order, over and over; a ratio is taken within each repetition,
and its median is given with a 95% interval from order statistics. On the CPU the clock is the process's own time, so
that other work on the machine does not count (but it still takes the caches).
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ConfigError
from .resolution import parse_size
from .train.config import split_words
from .train.files import write_atomically

MODES = ("inference", "training")


@dataclass(frozen=True)
class BenchConfig:
    """Time our models against timm's of the same function, and against no encoding at all.

    Args:
        models: comma-separated timm names that from_timm reads.
        sizes: comma-separated sizes in pixels, 224 or 224x320.
        modes: inference, training (forward and backward), or both.
        batch: images of a step.
        depth: blocks; None: the model's own.
        repeats: repetitions, in each of which every contender runs once.
        threads: CPU threads.
        out: the JSON file to write.
    """

    models: str = "vit_small_patch16_rope_224,vit_small_patch16_rope_mixed_224,vit_relpos_small_patch16_224"
    sizes: str = "224"
    modes: str = "inference,training"
    batch: int = 2
    depth: int | None = None
    repeats: int = 41
    threads: int = 1
    out: str = "runs/bench.json"


def bench(config: BenchConfig, command: str = "") -> list[dict[str, Any]]:
    """Run every row, print a table, write it with versions and hardware; returns the rows."""
    modes = split_words(config.modes)
    if not modes or any(mode not in MODES for mode in modes) or config.repeats < 1 or config.batch < 1:
        raise ConfigError(f"modes are {' and '.join(MODES)}, repeats and batch at least 1; got {config}")
    torch.set_num_threads(config.threads)
    rows = []
    print(
        "model, size, mode: peer/ours [95%], ours/limit [95%]; saved MiB and kernels of peer, ours, limit", flush=True
    )
    for name in split_words(config.models):
        for size in (parse_size(word) for word in split_words(config.sizes)):
            contenders = _contenders(name, size, config.depth)
            for mode in modes:
                rows.append(_row(name, size, mode, contenders, config))
                print(_line(rows[-1]), flush=True)
                write_atomically(Path(config.out), json.dumps(_about(command) | dict(rows=rows), indent=1).encode())
    return rows


def _contenders(name: str, size: tuple[int, int], depth: int | None) -> dict[str, nn.Module]:
    import timm

    from .models import from_timm

    if not timm.is_model(name):
        raise ConfigError(f"{name} is not a model of timm's; see timm.list_models()")
    arguments = {"img_size": size, "num_classes": 10} | ({} if depth is None else {"depth": depth})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        peer = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in peer.parameters():  # LayerScale and tables that start near zero would hide a difference
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return {"peer": peer, "ours": from_timm(peer), "limit": from_timm(peer, "none")}


def _row(name: str, size: tuple[int, int], mode: str, contenders: dict[str, nn.Module], config: BenchConfig):
    images = torch.randn(config.batch, 3, *size, generator=torch.Generator().manual_seed(0))
    for model in contenders.values():
        model.train(mode == "training")
    row: dict[str, Any] = dict(model=name, height=size[0], width=size[1], mode=mode, batch=config.batch)
    with torch.no_grad():
        peer, ours = contenders["peer"].eval()(images), contenders["ours"].eval()(images)
    row["difference"] = float((peer - ours).abs().max() / peer.abs().max())
    if row["difference"] > 1e-4:
        return row | dict(failed="ours does not compute what the peer computes")
    run = _train if mode == "training" else _infer
    for kind, model in contenders.items():
        model.train(mode == "training")
        row[f"kernels_{kind}"], row[f"saved_{kind}"] = kernels(model, images), saved_bytes(model, images)
        run(model, images)  # warm
    peer_ours, ours_limit = [], []
    order, seconds = list(contenders), dict.fromkeys(contenders, 0.0)
    shuffled = random.Random(0)
    for _ in range(config.repeats):
        shuffled.shuffle(order)
        for kind in order:
            start = time.process_time()
            run(contenders[kind], images)
            seconds[kind] = time.process_time() - start
        peer_ours.append(seconds["peer"] / seconds["ours"])
        ours_limit.append(seconds["ours"] / seconds["limit"])
    return row | dict(peer_ours=interval(peer_ours), ours_limit=interval(ours_limit), repeats=config.repeats)


def _infer(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


def _train(model: nn.Module, images: Tensor) -> None:
    model(images).sum().backward()
    model.zero_grad(set_to_none=True)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and the order statistics around it that hold the true median with 95% (the ends where there are few)."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


class _Count(TorchDispatchMode):
    """Operations that do work: views and bookkeeping are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        idle = any(word in str(function) for word in ("_unsafe_view", "detach", "promote_types"))
        self.number += not (function.is_view or idle)
        return function(*args, **(kwargs or {}))


def kernels(model: nn.Module, images: Tensor) -> int:
    """How many operations a forward without gradients dispatches, views excluded."""
    with torch.no_grad(), _Count() as count:
        model(images)
    return count.number


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward with gradients keeps for the backward, each storage once, parameters excluded."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(images)
    return sum(size for place, (_, size) in kept.items() if place not in parameters)


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']}, {row['height']}x{row['width']}, {row['mode']}: "
    if "failed" in row:
        return head + f"{row['failed']} (relative difference {row['difference']:.1e})"
    ratios = ", ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row[kind]) for kind in ("peer_ours", "ours_limit"))
    saved = ", ".join(f"{row[f'saved_{kind}'] / 2**20:.1f}" for kind in ("peer", "ours", "limit"))
    counts = ", ".join(str(row[f"kernels_{kind}"]) for kind in ("peer", "ours", "limit"))
    return f"{head}{ratios}; {saved}; {counts}"


def _about(command: str) -> dict[str, Any]:
    import os

    import timm

    from . import __version__
    from .train.runs import processor

    return dict(
        command=command, vit2dpe=__version__, torch=torch.__version__, timm=timm.__version__,
        python=platform.python_version(), cpu=processor(), threads=torch.get_num_threads(), load=os.getloadavg(),
    )  # fmt: skip
