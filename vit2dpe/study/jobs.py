"""Trials of a study, one after the other or several at a time, a process each.

The models of a study are small: two trainings on a thread each finish long before the same two one after the other on
two threads.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, TypeVar

import torch

from ..errors import TrainingError
from .replay import Needed, needed, replay, without_main

Progress = Callable[[str, int, Mapping[str, float]], None]  # name and seed of a trial, latest numbers of its training
T = TypeVar("T")
R = TypeVar("R")
MAX_DEFAULT = 8  # processes, unless more are requested


def count(jobs: int | None, threads: int | None, device: torch.device, trials: int) -> int:
    """How many trials run at a time: `jobs`, else one per `threads` cores of a CPU, and one at a time elsewhere."""
    if jobs is None:
        jobs = 1 if device.type != "cpu" else min(MAX_DEFAULT, (os.cpu_count() or 1) // (threads or 1))
    return max(1, min(jobs, trials))


class _Progress(NamedTuple):
    name: str
    seed: int
    numbers: Mapping[str, float]


class _Failure(NamedTuple):
    error: Exception


def each(
    run: Callable[[T, Progress], R],
    trials: Sequence[T],
    progress: Progress,
    *,
    jobs: int = 1,
    threads: int | None = None,
    encodings: Sequence[str] = (),
) -> Iterator[tuple[int, R]]:
    """(index, `run(trial, progress)`) of every trial, in the order in which they finish.

    Args:
        run: a function of a module, or a `partial` of one; sent to a process once, with its arguments.
        progress: called in this process, also for trials that another process trains.
        jobs: how many at a time. With several, each has a process of its own.
        threads: CPU threads of each; default torch's choice, and 1 where there are several processes.
        encodings: specs that the trials need; those of one's own are imported in each process (`replay`). Where that
            cannot be, because they were typed into a session, trials run one after the other in this one.

    Raises:
        TrainingError: where a process dies.
        Whatever a trial raises. The other processes are ended; finished trials are kept.
    """
    own = None if jobs == 1 else needed(encodings)
    if jobs > 1 and own is None:
        print("note: an encoding was typed into this session, where no other process finds it: one trial at a time")
        jobs, threads = 1, threads or 1
    if jobs == 1 or own is None:
        if threads:
            torch.set_num_threads(threads)
        for i, trial in enumerate(trials):
            yield i, run(trial, progress)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch in the middle of their work
    workers: dict[Connection, BaseProcess] = {}
    running: dict[Connection, int] = {}  # index of the trial that the worker at the other end is at
    pending = iter(enumerate(trials))
    try:
        for _ in range(jobs):
            pipe, far_end = context.Pipe()
            worker: BaseProcess = context.Process(target=_work, args=(run, far_end, threads or 1, own))
            with _lost_process(), without_main(unless=run):
                worker.start()
            workers[pipe] = worker
            far_end.close()  # the worker's alone, so that its death ends the pipe
            _assign(pipe, running, pending)
        while running:
            ready = wait(list(running))
            for pipe in [pipe for pipe in running if pipe in ready]:
                with _lost_process():
                    message = pipe.recv()
                if isinstance(message, _Progress):
                    progress(*message)
                elif isinstance(message, _Failure):
                    raise message.error
                else:
                    yield running.pop(pipe), message
                    _assign(pipe, running, pending)
    finally:
        for pipe, worker in workers.items():
            if running and worker.is_alive():
                worker.terminate()
            pipe.close()
            worker.join()


@contextmanager
def _lost_process() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise TrainingError(
            "a process that trained a trial died, perhaps for want of memory: the same command goes on from what is "
            "finished; --jobs 1 trains one at a time"
        ) from None


def _assign(pipe: Connection, running: dict[Connection, int], pending: Iterator[tuple[int, T]]) -> None:
    """Send the next trial, if there is one, to the worker at the other end."""
    for i, trial in pending:
        running[pipe] = i
        with _lost_process():
            pipe.send(trial)
        return


def _work(run: Callable[[T, Progress], R], pipe: Connection, threads: int, own: Needed) -> None:
    """Run trials that arrive through the pipe until it is closed; progress and results go back through it."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:  # do not outlive a study that was killed
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    try:
        while True:
            trial = pipe.recv()
            try:
                replay(own)
                pipe.send(run(trial, lambda *numbers: pipe.send(_Progress(*numbers))))
            except Exception as error:
                error.add_note(traceback.format_exc())  # the parent's traceback ends at the pipe
                pipe.send(_Failure(error))
    except (EOFError, ConnectionError, KeyboardInterrupt):  # the study ended
        return


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
