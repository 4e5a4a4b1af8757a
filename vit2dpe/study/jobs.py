"""Cells of a study, one after the other or several at a time, a process each.

The models of a study are small: two trainings on a thread each finish long before the same two one after the other on
two threads.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from ..errors import ConfigError, TrainingError

Rows = list[dict[str, Any]]
Progress = Callable[[str, int, dict[str, Any]], None]
MOST = 8  # processes that are started without being asked for


def count(jobs: int | None, threads: int | None, device: torch.device, cells: int) -> int:
    """How many cells run at a time: as asked, else one for `threads` cores of a CPU, and one at a time elsewhere."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if jobs is None:
        jobs = 1 if device.type != "cpu" else min(MOST, (os.cpu_count() or 1) // (threads or 1))
    return max(1, min(jobs, cells))


def each(
    run: Callable[..., Rows],
    fixed: tuple[Any, ...],
    cells: Sequence[tuple[Any, ...]],
    progress: Progress,
    *,
    jobs: int = 1,
    threads: int | None = None,
) -> Iterator[tuple[int, Rows]]:
    """`run(*fixed, *cell, progress)` of every cell: its number and its rows, as they are finished.

    Args:
        run: a function of a module, because processes find it by name.
        fixed: the arguments that all cells have in common, sent to a process once.
        progress: called here, also for what another process trains.
        jobs: how many at a time. With several, each has a process of its own.
        threads: CPU threads of each; default torch's choice, and 1 where there are several processes.

    Raises:
        TrainingError: where a process dies.
        Whatever a cell raises. The other processes are ended; what they have finished is kept.
    """
    if jobs == 1:
        if threads:
            torch.set_num_threads(threads)
        for i, cell in enumerate(cells):
            yield i, run(*fixed, *cell, progress)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch in the middle of their work
    said = context.SimpleQueue()
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, context, _prepare, (run, fixed, said, threads or 1))
    running: dict[Future[Rows], int] = {pool.submit(_run, cell): i for i, cell in enumerate(cells)}
    workers = [process for process in multiprocessing.active_children() if process not in others]
    try:
        while running:
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            while not said.empty():
                progress(*said.get())
            for future in done:
                yield running.pop(future), future.result()
            # The pool lists whom it watches while it still starts the last one (Python 3.11.7), so we look too.
            if running and multiprocessing.connection.wait([process.sentinel for process in workers], timeout=0):
                raise BrokenProcessPool
    except BrokenProcessPool:
        raise TrainingError(
            "a process that trained a cell died, perhaps for want of memory: the same command goes on from what is "
            "finished; --jobs 1 trains one at a time"
        ) from None
    finally:
        for process in workers if running else ():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _prepare(run: Callable[..., Rows], fixed: tuple[Any, ...], said: Any, threads: int) -> None:
    """What a new process does first."""
    global _task
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:  # it does not outlive a study that was killed
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _task = lambda cell: run(*fixed, *cell, lambda *row: said.put(row))  # noqa: E731


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


_task: Callable[[tuple[Any, ...]], Rows]


def _run(cell: tuple[Any, ...]) -> Rows:
    return _task(cell)
