"""Memory of a training step on a GPU, counted without one: on the fake CUDA tensors of `benchmarks.devtrace`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backward import backward
from .devtrace import fake_cuda, on_fake_cuda


class Memory(TorchDispatchMode):
    """Follows the memory of fake CUDA tensors that operations make: `peak` bytes at once, beside what was there before.

    To be entered inside `fake_cuda`. Views share memory, and what nothing refers to is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.device.type == "cuda" and x.untyped_storage()._cdata not in before:
                memory = x.untyped_storage()
                self.live[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def trace_memory(model: nn.Module, size: tuple[int, int], batch: int = 8) -> int:
    """Bytes at the peak of forward, loss and backward in bfloat16 autocast: activations, gradients, what is in passing.

    The backward here lets go of no activation on its way, which a real one does; parameters are not counted.
    """
    with fake_cuda():
        on_fake_cuda(model).train()
        x, labels = torch.empty(batch, 3, *size, device="cuda"), torch.empty(batch, dtype=torch.long, device="cuda")
        with Memory() as memory:
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), labels)
            backward(loss)
    return memory.peak
