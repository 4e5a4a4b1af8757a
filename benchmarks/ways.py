"""How a contender runs: eager, as a CUDA graph, or compiled, as a whole or block by block; and in what precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from vit2dpe.errors import ConfigError

WAYS = ("eager", "graph", "compiled", "blocks")
WARM_UPS = 8  # runs on a GPU before the first that counts: clocks, allocator and autotuning settle

T = TypeVar("T")


def in_precision(name: str, device: str, cached: bool = True) -> AbstractContextManager[object]:
    """The autocast context of a precision, or none."""
    if name != "autocast":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=cached)


def runner(
    module: nn.Module, step: Callable[[nn.Module, Tensor], object], x: Tensor, how: str, precision: str, device: str
) -> Callable[[], object]:
    """What runs `step` of the module and x in this way.

    Each run enters autocast anew: weights are cast in every step, as in a training, and not once for all.

    Raises:
        ConfigError: for `blocks` of a module that has none.
    """
    subject: nn.Module = torch.compile(module) if how == "compiled" else module  # type: ignore[assignment]
    if how == "blocks":
        for block in blocks(module):
            block.compile()

    def run() -> None:
        with in_precision(precision, device, cached=how != "graph"):
            step(subject, x)

    return captured(run)[0] if how == "graph" else run


def warm_up(run: Callable[[], object], device: str) -> None:
    for _ in range(1 if device == "cpu" else WARM_UPS):
        run()


def blocks(module: nn.Module) -> list[nn.Module]:
    """All blocks in order, through the stages of a Swin.

    Raises:
        ConfigError: where there are none.
    """
    if isinstance(found := getattr(module, "blocks", None), nn.Module):
        return list(found.children())
    if isinstance(found := getattr(module, "features", None), nn.Sequential):
        # torchvision: stages at odd places, between them the reductions
        return [block for stage in list(found)[1::2] for block in stage.children()]
    if isinstance(found := getattr(module, "layers", None), nn.Module):
        return [block for stage in found.children() for block in blocks(stage)]
    raise ConfigError(f"{type(module).__name__} has no blocks that the bench finds")


def captured(run: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A run as a CUDA graph: what replays it, and what the captured run returned (its tensors are written anew)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def exact_products(device: str) -> AbstractContextManager[object]:
    """Within, float32 is float32: no TF32, of which convolutions make use unless it is forbidden."""
    if not device.startswith("cuda"):
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def allocated_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most that a run adds to the memory of a CUDA device, workspace of kernels included; None on others."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release(how: str, device: str) -> None:
    """Let go of what a row held: of graphs of compilers, and of memory."""
    if how in ("compiled", "blocks"):
        torch.compiler.reset()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
