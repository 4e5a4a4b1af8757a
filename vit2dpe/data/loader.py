"""Batches of images in a given order: out of memory, or decoded from disk by worker processes, some batches ahead.

Workers only decode; every random draw is made afterwards, on the whole batch, by its key (seed, epoch, step, purpose).
So neither their number nor a restart changes a bit: a stream gives what the same images in memory give.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

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


class Feed:
    """The training batches of a split: `feed(epoch, step)`, with the next ones already under way.

    Args:
        split: the images, at the training size.
        plan: the numbers of the images of step `step` of epoch `epoch`.
        steps: of an epoch.
        workers: processes that decode; 0: this one does. None: `default_workers`.
    """

    def __init__(
        self,
        split: Split | FileSplit,
        plan: Callable[[int, int], Tensor],
        steps: Callable[[], int],
        workers: int | None,
    ) -> None:
        self.split, self.plan, self.steps, self.workers = split, plan, steps, workers
        self.batches: Iterator[Tensor] = iter(())
        self.next: tuple[int, int] | None = None

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
    """uint8 (B, C, H, W) for every set of numbers in `plan`, in its order.

    Raises:
        DataError: naming a file that cannot be read.
        TrainingError: naming a worker that died, or did not answer within a minute, and the files it was at.
    """
    workers = default_workers() if workers is None else workers
    if isinstance(split, Split) or workers == 0:
        yield from map(split.pixels, plan)
        return
    flight = _Flight(split, plan, workers)
    loader: DataLoader[Any] = DataLoader(
        _Files(split),
        batch_sampler=flight,
        num_workers=workers,
        collate_fn=_together,
        timeout=PATIENCE_S,
        prefetch_factor=AHEAD,
        generator=torch.Generator(),  # it draws a seed for the workers, and must not touch the training's draws
    )
    batches = iter(loader)
    flight.pids = [worker.pid for worker in getattr(batches, "_workers", [])]
    _FLIGHTS.append(flight)
    try:
        for batch in batches:
            if isinstance(batch, str):
                raise DataError(batch)
            flight.received += 1
            yield batch
    except RuntimeError as error:
        if found := lost_worker(error):
            raise found from None
        raise
    finally:
        _FLIGHTS.remove(flight)
        end = getattr(batches, "_shutdown_workers", None)  # at once, not when an error's traceback is let go of
        if end is not None:
            end()


def lost_worker(error: BaseException) -> TrainingError | None:
    """What torch's message of a lost worker means; None if it is another error.

    Torch tells of a death as soon as the system does, so it may surface anywhere in the training.
    """
    said = " ".join(str(error).split())
    late = "DataLoader timed out" in said
    killed = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", said)
    if not late and not killed:
        return None
    pid = int(killed[1]) if killed else None
    who = next((told for flight in _FLIGHTS if (told := flight.describe(pid))), f"a worker (process {pid})")
    how = f"gave no batch within {PATIENCE_S:g} seconds" if late else said.partition(") ")[2] or "ended"
    return TrainingError(
        f"{who} {how.rstrip('. ')}: if memory ran out take fewer --data.workers or a smaller --optim.batch_size; "
        "--data.workers 0 decodes in the training process; with --resume the run goes on from its last checkpoint"
    )


class _Flight:
    """Which batches workers have in hand: batch k is worker k mod n's."""

    def __init__(self, split: FileSplit, plan: Iterable[Tensor], workers: int) -> None:
        self.split, self.plan, self.workers = split, plan, workers
        self.pids: list[int | None] = []
        self.given: dict[int, list[int]] = {}
        self.received = 0

    def __iter__(self) -> Iterator[list[int]]:
        for number, index in enumerate(self.plan):
            self.given = {k: v for k, v in self.given.items() if k >= self.received}
            self.given[number] = index.tolist()
            yield self.given[number]

    def describe(self, pid: int | None) -> str | None:
        """`data worker 1 (process 4242), at train/a/7.png and 15 more,`; without a pid, the one that is waited for."""
        if pid is not None and pid not in self.pids:
            return None
        worker = self.received % self.workers if pid is None else self.pids.index(pid)
        batch = next(
            (v for k, v in sorted(self.given.items()) if k >= self.received and k % self.workers == worker), []
        )
        files = f", at {self.split.path(batch[0])} and {len(batch) - 1} more," if batch else ""
        return f"data worker {worker} (process {self.pids[worker]}){files}"


_FLIGHTS: list[_Flight] = []  # those under way, for a death that torch tells of outside of `stream`


class _Files(Dataset):
    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.split.read(index)
        except DataError as error:  # as a value: torch would wrap its traceback around the message
            return str(error)


def _together(images: list[Tensor | str]) -> Tensor | str:
    wrong = next((image for image in images if isinstance(image, str)), None)
    return torch.cat(images) if wrong is None else wrong  # type: ignore[arg-type]
