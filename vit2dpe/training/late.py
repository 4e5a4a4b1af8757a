"""Numbers of a device that the host reads later, when the device has other work, so that neither waits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class LateNumbers:
    """(n,) numbers on their way to the host: on CUDA copied into pinned memory in the order of the device's work.

    Reading waits for what was queued before them, and not for what was queued since.
    """

    def __init__(self, values: Tensor) -> None:
        self._host, self._event = values, None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._host.tolist()]


class StepResult:
    """Numbers of one update, read from the device at the first look at any of them.

    Args:
        names: of the numbers: train_loss, and those that the task adds.
        values: the norm of the gradient before it is clipped, then the numbers, means over the items of all ranks;
            None: there was no item.
        items: how many items, over all ranks.
        half: whether the gradient is that of float16, whose overflow is no fault.
    """

    def __init__(self, names: Sequence[str], values: Tensor | None, items: int, half: bool = False) -> None:
        self.names, self.items, self.half = tuple(names), items, half
        self._late = None if values is None else LateNumbers(values)

    @cached_property
    def _values(self) -> list[float]:
        return [0.0] if self._late is None else self._late.read()

    @property
    def norm(self) -> float:
        return self._values[0]

    @property
    def numbers(self) -> dict[str, float]:
        return dict(zip(self.names, self._values[1:], strict=True))

    @cached_property
    def finite(self) -> bool:
        """Whether loss and gradient were; if not, no step was taken. In float16 whether the loss was: a gradient that
        overflowed is left out by the scaler, which then halves its factor. True of a batch without an item, such as
        one of masked tokens in which none is hidden, which takes no step either."""
        return all(map(math.isfinite, self._values[1:2] if self.half else self._values[:2]))
