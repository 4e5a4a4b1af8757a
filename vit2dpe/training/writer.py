"""Saving beside the training: tensors as they are now, copied to the host, and a thread that writes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType

import torch
from torch import Tensor

from .distributed import whole


class HostCopies:
    """Copies of tensors in the host's memory, as they are when they are asked for, whatever becomes of them later.

    On CUDA they go into pinned memory in the order of the device's work, and the host does not wait; `wait` does, in
    the thread that reads them. Elsewhere they are there at once. A sharded tensor is gathered: every rank must call.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        value = whole(tensor)
        if value.device.type != "cuda":
            return value.to("cpu", copy=True)
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        return host

    def seal(self, device: torch.device) -> None:
        """No more copies follow: what `wait` waits for is all that was queued before."""
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Writer:
    """Runs one job at a time in a thread of its own, within a context that waits for the last.

    An error of a job is raised by the next call, or at the end of the context; where another error ends that, it stands
    beside it as a note.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before, and begin this one."""
        self.wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "vit2dpe-saving")
        self._pending = self._thread.submit(copy_context().run, job)

    def wait(self) -> None:
        """Until nothing is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"the last save failed too: {failed}")
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
