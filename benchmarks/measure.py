"""Measurements: paired ratios of time; without a clock, the number of operations, saved bytes and peak bytes.

Contenders run in a shuffled order in every repetition, and ratios are taken within a repetition, so that other load on
the machine affects all of them alike. On the CPU the clock is the CPU time of this process: other processes do not
count, although they compete for the caches.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Interval = tuple[float, float, float]
Outputs = Tensor | Sequence[Tensor]  # of a model or a block; of tables and rotations several


def infer(module: nn.Module, x: Tensor) -> Outputs:
    with torch.no_grad():
        return module(x)


class Step:
    """Forward and backward of a module, with output gradients that are the same for every contender.

    Args:
        module: the contender.
        like: the peer, whose outputs have the shape of the gradient.
    """

    def __init__(self, module: nn.Module, like: nn.Module, x: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(y.shape, generator=generator).to(y) for y in outputs(infer(like, x))]
        self.gradients = module.gradients(gradients) if hasattr(module, "gradients") else gradients  # type: ignore[operator]

    def __call__(self, module: nn.Module, x: Tensor) -> None:
        self.backward(module, x)
        clear(module, x)

    def backward(self, module: nn.Module, x: Tensor) -> None:
        torch.autograd.backward(outputs(module(x)), self.gradients)


def clear(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None


def outputs(given: Outputs) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every run in every repetition, in each of which the order is another."""
    order, shuffled = list(runs), random.Random(0)
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(repeats):
        shuffled.shuffle(order)
        for kind in order:
            seconds[kind].append(timed(runs[kind], device))
    return seconds


def timed(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one run: of the process on the CPU, between events of the stream on CUDA, of the wall elsewhere."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    if device.startswith("cuda"):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1000
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def paired(seconds: dict[str, list[float]], a: str, b: str) -> Interval:
    """The time of a over that of b within a repetition, median and interval over the repetitions."""
    return interval([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])


def interval(ratios: list[float]) -> Interval:
    """Median and the order statistics around it that hold the true median with 95% (the ends where there are few)."""
    ordered, n = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


class _Count(TorchDispatchMode):
    """Operations that do work (views and bookkeeping are not counted), and the bytes of tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.live, self.peak = 0, 0, 0
        self.seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        idle = any(word in str(function) for word in ("_unsafe_view", "detach", "promote_types"))
        self.number += not (function.is_view or idle)
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            inputs = {x.untyped_storage()._cdata for x in _tensors(args)}
            for x in _tensors(result):
                self._add(x.untyped_storage(), inputs)
        return result

    def _add(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in inputs:
            return

        def gone(_: weakref.ref) -> None:
            self.live -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(tree: object) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def kernels(module: nn.Module, x: Tensor) -> int:
    """How many operations a forward without gradients dispatches, views excluded."""
    with _Count() as count:
        infer(module, x)
    return count.number


def step_kernels(module: nn.Module, x: Tensor) -> int:
    """How many operations a forward and a backward dispatch, views excluded."""
    step = Step(module, module, x)
    with _Count() as count:
        step.backward(module, x)
    clear(module, x)
    return count.number


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once that a run allocates; workspace inside a kernel is not counted."""
    with _Count() as count:
        run()
    return count.peak


def resident_bytes(run: Callable[[], object]) -> int | None:
    """The most memory that the whole process has while a run goes on; None off Linux, where no peak begins anew."""
    process = Path("/proc/self")
    try:
        (process / "clear_refs").write_text("5")
    except OSError:
        return None
    run()
    (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def buffer_bytes(module: nn.Module) -> int:
    """Bytes of a module's buffers, each storage once."""
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in module.buffers()}
    return sum(storages.values())


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that a forward with gradients keeps for the backward, each storage once, parameters excluded."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(size for place, (_, size) in kept.items() if place not in parameters)
