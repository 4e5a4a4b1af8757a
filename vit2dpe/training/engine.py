"""The training loop, one step after the other. What a step does to the weights: `update`.

It works on tasks (`task.Task`), not images or words. Every random draw is keyed by (seed, epoch, step, rank, purpose),
so a run that was killed anywhere goes on from its last checkpoint to the same bits as one that was not: on a CPU
always, on a GPU with `run.deterministic`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from ..data.loader import lost_worker, watch_workers
from ..errors import Stopped, TrainingError, unknown
from ..models.spec import ModelSpec
from ..spec import Plain
from .devices import deterministic, evaluation_precision
from .distributed import ALONE, World, sum_over_ranks
from .interrupts import Interrupts
from .late import StepResult
from .log import Bar, Row, Table, Trackers
from .settings import OptimConfig, RunConfig
from .snapshots import Snapshots, TrainingState
from .task import B, Task
from .update import Updater


def fit(
    model: nn.Module,
    task: Task[B],
    optim: OptimConfig,
    run: RunConfig,
    *,
    folder: Path,
    spec: ModelSpec | None = None,
    resume: bool = False,
    world: World = ALONE,
    about: Mapping[str, Plain] | None = None,
    progress: Callable[[Row], None] | None = None,
    on_epoch: Callable[[Row, nn.Module], None] | None = None,
    stop_after: int | None = None,
) -> list[Row]:
    """Train `model` in place; write `metrics.csv`, `last/` and `best/` under `folder`.

    Args:
        task: batches, loss and evaluation.
        spec: how to build the model again; without it no checkpoint is written, and signals are not caught.
        resume: go on from `folder/last`, if there is one.
        about: more for the checkpoint's JSON.
        progress: called with the latest numbers about once a second.
        on_epoch: called after each evaluation with its row and the model that was evaluated.
        stop_after: stop after so many updates (a smoke run).

    Returns:
        One row an epoch: epoch, step, lr, train_loss, the task's own numbers, those of its evaluation where there was
        one, as after the last epoch, the throughput, the share of time spent waiting for data, memory; seconds, and the
        processor time of the first process and its threads, both with those of the parts before a resume.

    Raises:
        ConfigError: for settings that cannot work.
        CheckpointError: if what is to be resumed is not of this training.
        TrainingError: if losses stay not finite, or memory runs out.
        Stopped: after a signal, when everything is saved.
    """
    with deterministic(run.deterministic):
        return Trainer(model, task, optim, run, folder, spec, world, about or {}, progress, on_epoch, stop_after).fit(
            resume
        )


@dataclass(eq=False)
class Trainer(Generic[B]):
    """One training; the arguments are those of `fit`."""

    model: nn.Module
    task: Task[B]
    optim: OptimConfig
    run: RunConfig
    folder: Path
    spec: ModelSpec | None
    world: World
    about: Mapping[str, Plain]
    progress: Callable[[Row], None] | None
    on_epoch: Callable[[Row, nn.Module], None] | None
    stop_after: int | None

    def __post_init__(self) -> None:
        self.updater = Updater(self.model, self.task, self.optim, self.run, self.world)
        self.model, self.device = self.updater.model, self.updater.device
        trained = (self.model, self.updater.averaged, self.updater.optimizer, self.updater.scaler)
        self.snapshots = Snapshots(self.folder, self.spec, *trained, self.world)
        self.state = TrainingState(batch_size=self.optim.batch_size, steps_per_epoch=self.task.steps_per_epoch)
        self.last_save, self.last_call = time.monotonic(), -math.inf
        self.waited = 0.0
        self.unread: tuple[StepResult, int, int, object] | None = None  # of the last step: epoch, step, its samples

    # The loop

    def fit(self, resume: bool) -> list[Row]:
        if resume and (self.folder / "last" / "model.json").is_file():
            self.load()
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.world.first
        self.table = Table(self.folder / "metrics.csv", self.state.rows) if first else None
        about: dict[str, Plain] = dict(optim=asdict(self.optim), run=asdict(self.run), **self.about)
        wandb = self.run.wandb if first else None
        trackers = Trackers(self.folder, first and self.run.tensorboard, wandb, about, resume)
        self.world.wait()  # for folders and trackers of the first
        total = self.optim.epochs * self.task.steps_per_epoch
        self.began = time.monotonic() - self.state.seconds
        self.cpu_began = time.process_time() - self.state.cpu_seconds
        with (
            Interrupts(listen=self.spec is not None) as self.interrupts,
            Bar(total, self.folder.name, self.state.place, first) as self.bar,
            watch_workers() as streams,
            self.snapshots.writer,
        ):
            try:
                while self.state.epoch < self.optim.epochs and not self._patience_ended():
                    self._train_epoch(self.state.epoch)
                    trackers.add(self._evaluate())
                    self.world.wait()
                    if self._stop_reached():
                        break
                self.snapshots.finish()
            except RuntimeError as error:  # torch reports a dead data worker wherever the training is at that moment
                if lost := lost_worker(error, streams):
                    raise lost from error
                raise
            finally:
                self.task.close()
                trackers.close()
        return self.table.rows if self.table is not None else []

    def _train_epoch(self, epoch: int) -> None:
        """The remaining steps of an epoch."""
        steps = self.task.steps_per_epoch
        began, self.waited, counted = time.monotonic(), 0.0, self.state.count
        for step in range(self.state.place - epoch * steps, steps):
            if self._stop_reached():
                break
            self._update(epoch, step)
            self._report(epoch)
            stop, due = self._agree()
            if stop:
                self._leave()
            if due:
                self.save()
        self._settle()
        self.pace = (time.monotonic() - began, self.state.count - counted)

    def _update(self, epoch: int, step: int) -> None:
        state = self.state
        self.updater.schedule.step_update(state.place)
        began = time.monotonic()
        batch = self.task.batch(epoch, step)
        self.waited += time.monotonic() - began
        result = self.updater.step(batch, epoch, step, state.step, self._account)
        index = batch.get("index") if isinstance(batch, dict) else None
        self.unread = (result, epoch, step, index)
        state.step += 1
        if not self.updater.late:
            self._account()

    def _account(self) -> None:
        """Add the numbers of the last step to those of the epoch; read now, whenever that is."""
        if self.unread is None:
            return
        (result, epoch, step, index), self.unread = self.unread, None
        if not result.finite:
            self._refuse(epoch, step, result, index)
            return
        state, items = self.state, result.items
        state.count, state.bad = state.count + items, 0
        for name, value in result.numbers.items():
            state.sums[name] = state.sums.get(name, 0.0) + value * items

    def _settle(self) -> None:
        """Finish the last step: wait for its numbers, and let the running average follow it."""
        self._account()
        self.updater.settle()

    def _stop_reached(self) -> bool:
        return self.stop_after is not None and self.state.step >= self.stop_after

    def _refuse(self, epoch: int, step: int, result: StepResult, index: object) -> None:
        """A loss or gradient is not finite, the step was not taken: record its samples in `bad_batches.jsonl`."""
        loss = result.numbers["train_loss"]
        entry = dict(epoch=epoch, step=step, rank=self.world.rank, loss=str(loss), grad_norm=str(result.norm))
        entry["index"] = index.tolist() if isinstance(index, Tensor) else None
        with (self.folder / f"bad_batches{self.world.rank or ''}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.state.bad += 1
        self.bar.print(f"the loss became {loss} at epoch {epoch}, step {step}: the step is not taken")
        if self.state.bad >= self.run.bad_losses:
            self.state.step -= self.state.bad  # resuming tries these steps again, with the last finite weights
            self.state.bad = 0
            self.save()
            self.snapshots.finish()
            raise TrainingError(
                f"the loss was not finite {self.run.bad_losses} times in a row, last at epoch {epoch}, step {step} of "
                f"{self.folder.name}: the samples are in {self.folder / 'bad_batches.jsonl'}, the weights before them "
                "in last/; try a lower --optim.lr, --optim.clip_grad 1 or --run.precision float32"
            )

    # Evaluation and reports

    def _evaluate(self) -> Row:
        state, averaged = self.state, self.updater.averaged
        evaluated = self.model if averaged is None else averaged
        self.snapshots.finish()  # before data workers are forked
        self.interrupts.at_once = self.world.size == 1
        try:
            if self._agree()[0]:
                self._leave()
            with evaluation_precision(self.run.precision, self.device):
                score = self.task.evaluate(evaluated) if self._due(state.epoch + 1) or self._stop_reached() else {}
            self.world.wait()  # a task may measure on one process alone
        except Stopped:
            self._leave()
        finally:
            self.interrupts.at_once = False
        seconds, items = self.pace
        row: Row = dict(epoch=state.epoch + 1, step=state.step, lr=self.updater.lr)
        row |= {name: value / max(1, state.count) for name, value in state.sums.items()} or {"train_loss": math.nan}
        row |= score
        self._read_clocks()
        row[f"{self.task.unit}_per_s"] = items / seconds if seconds else 0.0
        row["waiting"] = self.waited / seconds if seconds else 0.0
        if self.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        row |= dict(seconds=state.seconds, cpu_seconds=state.cpu_seconds)
        if self.table is not None:
            self.table.add(row)
        state.epoch, state.rows, state.count, state.sums = state.epoch + 1, state.rows + 1, 0, {}
        better = self._improved(score)
        if better is not None:
            state.best, state.best_epoch = better, state.epoch
        self.save(row, best=better is not None)
        if self.on_epoch is not None and score:
            self.on_epoch(row, evaluated)
        return row

    def _improved(self, score: Mapping[str, float]) -> float | None:
        """The number that decides best/, if it is the best so far; one that is not finite never is."""
        if self.task.best is None or not score:
            return None
        name, direction = self.task.best
        if name not in score:
            raise unknown(f"number that decides best/, {type(self.task).__name__}.best,", name, score)
        value, best = score[name], self.state.best
        better = best is None or (value > best if direction == "max" else value < best)
        return value if better and math.isfinite(value) else None

    def _due(self, epoch: int) -> bool:
        """Whether an evaluation follows the epoch of this number, from 1."""
        every = 1 if self.run.eval_every is None else self.run.eval_every
        return epoch == self.optim.epochs or (every > 0 and epoch % every == 0)

    def _patience_ended(self) -> bool:
        state, patience = self.state, self.run.patience
        watched = self.task.best is not None and patience > 0 and self._due(state.epoch)
        return watched and state.epoch - state.best_epoch >= patience

    def _read_clocks(self) -> None:
        self.state.seconds = time.monotonic() - self.began
        self.state.cpu_seconds = time.process_time() - self.cpu_began

    def _report(self, epoch: int) -> None:
        state = self.state
        loss = state.sums.get("train_loss", math.nan) / max(1, state.count)
        row: Row = dict(epoch=epoch + 1, epochs=self.optim.epochs, step=state.step, train_loss=loss)
        self.bar.step(row)
        if self.progress is not None and state.count and time.monotonic() - self.last_call > 1:
            self.last_call = time.monotonic()
            self.progress(row)

    # Stopping and going on

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank received a signal, and whether a save is due by the clock of the first; all ranks agree."""
        minutes = (time.monotonic() - self.last_save) / 60
        due = self.world.first and 0 < self.run.save_minutes < minutes
        stop, save = sum_over_ranks([self.interrupts.received, due], self.world)
        return bool(stop), bool(save)

    def _leave(self) -> None:
        self.interrupts.at_once = False
        self.save()
        self.snapshots.finish()
        self.bar.print(f"stopped at step {self.state.step} and saved; --resume goes on from there")
        raise Stopped(128 + (self.interrupts.received or 15))

    def save(self, row: Row | None = None, best: bool = False) -> None:
        """Begin to write last/, and best/ too where these are the best weights so far; steps may follow at once."""
        if self.spec is None:
            return
        self._settle()
        self._read_clocks()
        self.last_save = time.monotonic()
        about: dict[str, Plain] = dict(optim=asdict(self.optim), run=asdict(self.run), final=row)
        self.snapshots.save(
            ("best", "last") if best else ("last",), self.state, {**about, **self.task.describe(), **self.about}
        )

    def load(self) -> None:
        self.state = self.snapshots.load(self.task.describe())
        self.state.count_in(self.task.steps_per_epoch, self.optim.batch_size)
        self.updater.schedule.step_update(max(0, self.state.place - 1))  # the rate of the last update
