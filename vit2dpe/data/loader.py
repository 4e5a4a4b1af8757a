"""Batches of images in a given order: from memory, or from files that worker processes decode some batches ahead.

Workers only decode; every random draw is made afterwards, on the whole batch, by its key (seed, epoch, step, purpose).
So neither their number nor a restart changes a bit: images on disk give what the same images in memory give.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, TrainingError
from .splits import FileSplit, Split

PATIENCE_S = 60.0  # a batch that takes longer is given up
AHEAD = 2  # batches that each worker prepares


def default_workers() -> int:
    """Of this process: the cores, shared between the processes of this machine, eight at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@dataclass(eq=False)
class Feed:
    """Training batches of a split, `feed(epoch, step)`; the following ones are decoded in the meantime.

    Args:
        split: the images, at the training size.
        plan: the indices of the images of step `step` of epoch `epoch`.
        steps: of an epoch.
        workers: processes that decode; 0: this one does. None: `default_workers`.
    """

    split: Split | FileSplit
    plan: Callable[[int, int], Tensor]
    steps: Callable[[], int]
    workers: int | None
    batches: Iterator[Tensor] = field(default_factory=lambda: iter(()), init=False)
    next: tuple[int, int] | None = field(default=None, init=False)

    def __call__(self, epoch: int, step: int) -> Tensor:
        """uint8 (B, C, H, W)"""
        if isinstance(self.split, Split):
            return self.split.pixels(self.plan(epoch, step))
        if self.next != (epoch, step):
            self.close()
            self.batches = stream(self.split, self._from(epoch, step), self.workers)
        pixels = next(self.batches)
        self.next = (epoch, step + 1) if step + 1 < self.steps() else (epoch + 1, 0)
        return pixels

    def close(self) -> None:
        """End the workers. A later call starts new ones."""
        if isinstance(self.batches, Generator):
            self.batches.close()
        self.next = None

    def _from(self, epoch: int, step: int) -> Iterator[Tensor]:
        while True:
            for each in range(step, self.steps()):
                yield self.plan(epoch, each)
            epoch, step = epoch + 1, 0


def stream(split: Split | FileSplit, plan: Iterable[Tensor], workers: int | None = None) -> Iterator[Tensor]:
    """uint8 (B, C, H, W) for each tensor of indices in `plan`, in its order.

    Raises:
        DataError: naming a file that cannot be read.
        TrainingError: naming a worker that died, or gave no batch within a minute, and the files it was decoding.
    """
    workers = default_workers() if workers is None else workers
    if isinstance(split, Split) or workers == 0:
        yield from map(split.pixels, plan)
        return
    assigned = Assigned(split, plan, torch.zeros(workers, dtype=torch.long).share_memory_())
    loader: DataLoader[Tensor | str] = DataLoader(
        _Files(split),
        batch_sampler=assigned,
        num_workers=workers,
        collate_fn=_collate,
        timeout=PATIENCE_S,
        prefetch_factor=AHEAD,
        worker_init_fn=partial(_register, assigned.pids),
        generator=torch.Generator(),  # it draws a seed for the workers, and must not touch the training's draws
    )
    batches = iter(loader)
    watched = _STREAMS.get()
    streams = [] if watched is None else watched
    streams.append(assigned)
    try:
        for batch in batches:
            if isinstance(batch, str):
                raise DataError(batch)
            assigned.received += 1
            yield batch
    except RuntimeError as error:
        if (lost := lost_worker(error, [assigned])) is None:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the iterator
        raise lost from None
    finally:
        streams.remove(assigned)
        del batches  # which ends the workers at once


@contextmanager
def watch_workers() -> Iterator[Sequence[Assigned]]:
    """The streams that are opened within it, by the same thread or task, and still run: for `lost_worker`."""
    streams: list[Assigned] = []
    token = _STREAMS.set(streams)
    try:
        yield streams
    finally:
        _STREAMS.reset(token)


def lost_worker(error: BaseException, streams: Sequence[Assigned]) -> TrainingError | None:
    """The error that torch's message about a dead or silent worker stands for; None if it is another error.

    torch raises it as soon as the system reports the death, so it may surface anywhere in the training.
    """
    message = " ".join(str(error).split())
    late = "DataLoader timed out" in message
    killed = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", message)
    if not late and not killed:
        return None
    pid = int(killed[1]) if killed else None
    who = next((name for each in streams if (name := each.describe(pid))), f"a worker (process {pid})")
    how = f"gave no batch within {PATIENCE_S:g} seconds" if late else message.partition(") ")[2] or "ended"
    return TrainingError(
        f"{who} {how.rstrip('. ')}: if memory ran out take fewer --data.workers or a smaller --optim.batch_size; "
        "--data.workers 0 decodes in the training process; with --resume the run goes on from its last checkpoint"
    )


@dataclass(eq=False)
class Assigned:
    """The batch sampler of a stream, which remembers the batches that workers have in hand: k is worker k mod n's.

    Args:
        split: the files.
        plan: the indices of every batch.
        pids: int64 (n,) in shared memory, the processes of the workers.
    """

    split: FileSplit
    plan: Iterable[Tensor]
    pids: Tensor
    batches: dict[int, list[int]] = field(default_factory=dict)
    received: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        for number, index in enumerate(self.plan):
            self.batches = {k: v for k, v in self.batches.items() if k >= self.received}
            self.batches[number] = index.tolist()
            yield self.batches[number]

    def describe(self, pid: int | None) -> str | None:
        """`data worker 1 (process 4242), at train/a/7.png and 15 more,`; without a pid, the one that is waited for."""
        pids = self.pids.tolist()
        if pid is not None and pid not in pids:
            return None
        worker = self.received % len(pids) if pid is None else pids.index(pid)
        pending = (v for k, v in sorted(self.batches.items()) if k >= self.received and k % len(pids) == worker)
        batch = next(pending, [])
        files = f", at {self.split.path(batch[0])} and {len(batch) - 1} more," if batch else ""
        return f"data worker {worker} (process {pids[worker]}){files}"


_STREAMS: ContextVar[list[Assigned] | None] = ContextVar("streams of this thread's training", default=None)


def _register(pids: Tensor, worker: int) -> None:
    pids[worker] = os.getpid()


class _Files(Dataset[Tensor | str]):
    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.split.read(index)
        except DataError as error:  # as a value: torch would wrap its traceback around the message
            return str(error)


def _collate(images: list[Tensor | str]) -> Tensor | str:
    wrong = next((image for image in images if isinstance(image, str)), None)
    return torch.cat([image for image in images if isinstance(image, Tensor)]) if wrong is None else wrong
