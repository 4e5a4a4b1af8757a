"""The training loop: optimizer and schedule from timm, one step after the other, nothing hidden.

It knows tasks (`task.Task`), not images or words. Every random draw is keyed by (seed, epoch, step, rank, purpose), so
a run that was killed anywhere goes on from its last checkpoint to the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, Stopped, TrainingError, unknown
from .checkpoint import ModelSpec, flatten, read_meta, read_tensors, unflatten, write_checkpoint
from .distributed import ALONE, World, sharded_like, sum_over_ranks, unsynchronized, whole, wrapped
from .keys import keyed
from .log import Bar, Row, Table, Trackers
from .schedules import Noam
from .settings import OptimConfig, RunConfig
from .signals import Signals
from .task import Batch, Task, split_batch

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class State:
    """Where a training is: what its checkpoint says beside the tensors."""

    epoch: int = 0  # epochs that are finished and evaluated
    step: int = 0  # updates
    count: int = 0  # items of this epoch so far, and sums over them
    sums: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    best: float | None = None
    best_epoch: int = 0
    bad: int = 0  # losses in a row that were not finite
    seconds: float = 0.0


def fit(
    model: nn.Module,
    task: Task,
    optim: OptimConfig,
    run: RunConfig,
    *,
    folder: Path,
    spec: ModelSpec | None = None,
    resume: bool = False,
    world: World = ALONE,
    about: dict[str, Any] | None = None,
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
        One row an epoch: epoch, step, lr, train_loss, the task's own numbers, those of its evaluation, the throughput,
        the share of time spent waiting for data, memory, seconds.

    Raises:
        ConfigError: for settings that cannot work.
        CheckpointError: if what is to be resumed is not of this training.
        TrainingError: if losses stay not finite, or memory runs out.
        Stopped: after a signal, when everything is saved.
    """
    return Trainer(
        model, task, optim, run, folder, spec, world, about or {}, progress or (lambda row: None), on_epoch, stop_after
    ).fit(resume)


class Trainer:
    """One training, as `fit` describes it."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optim: OptimConfig,
        run: RunConfig,
        folder: Path,
        spec: ModelSpec | None,
        world: World,
        about: dict[str, Any],
        progress: Callable[[Row], None],
        on_epoch: Callable[[Row, nn.Module], None] | None,
        stop_after: int | None,
    ) -> None:
        self.task, self.optim, self.run, self.folder = task, optim, run, folder
        self.spec, self.world, self.about = spec, world, about
        self.progress, self.on_epoch, self.stop_after = progress, on_epoch, stop_after
        self.device = pick_device(run.device)
        self.autocast = precision(run.precision, self.device)
        if run.grad_checkpointing:
            checkpointing(model)
        self.model = model.to(self.device)
        self.ema = None
        if optim.ema:
            self.ema = ModelEmaV3(model, decay=optim.ema, use_warmup=optim.ema_warmup)
        self.net = wrapped(self.model, run.parallel, world)
        if self.ema is not None and run.parallel == "fsdp":
            self.ema.module = wrapped(self.ema.module, "fsdp", world)
        self.forward: Any = torch.compile(self.net) if run.compile else self.net
        self.optimizer = make_optimizer(self.model, optim)
        self.schedule = make_schedule(self.optimizer, optim, task.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.state = State()
        self.last_save, self.last_call = time.monotonic(), -math.inf
        self.waited = 0.0

    # The loop

    def fit(self, resume: bool) -> list[Row]:
        if resume and (self.folder / "last" / "model.json").is_file():
            self.load()
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.world.first
        self.table = Table(self.folder / "metrics.csv", self.state.rows) if first else None
        trackers = Trackers(self.folder, self.run.tensorboard, self.run.wandb) if first else None
        total = self.optim.epochs * self.task.steps_per_epoch
        self.began = time.monotonic() - self.state.seconds
        with (
            Signals(listen=self.spec is not None) as self.signals,
            Bar(total, self.folder.name, self.state.step, first) as self.bar,
        ):
            while self.state.epoch < self.optim.epochs and not self._patience_ended():
                self._train_epoch(self.state.epoch)
                row = self._evaluate()
                if trackers is not None:
                    trackers.add(row)
                if self.stop_after is not None and self.state.step >= self.stop_after:
                    break
        if trackers is not None:
            trackers.close()
        return self.table.rows if self.table is not None else []

    def _train_epoch(self, epoch: int) -> None:
        """What is left of an epoch."""
        steps = self.task.steps_per_epoch
        began, self.waited, counted = time.monotonic(), 0.0, self.state.count
        for step in range(self.state.step - epoch * steps, steps):
            if self.stop_after is not None and self.state.step >= self.stop_after:
                break
            self._update(epoch, step)
            self._tell(epoch)
            stop, due = self._agree()
            if stop:
                self._leave()
            if due:
                self.save()
        self.pace = (time.monotonic() - began, self.state.count - counted)

    def _update(self, epoch: int, step: int) -> None:
        state, task = self.state, self.task
        self.schedule.step_update(state.step)
        batch = self._batch(epoch, step)
        # Dropout, stochastic depth, encodings that draw in training. One process draws as it always did.
        torch.manual_seed(keyed(self.run.seed, epoch, state.step, "model", *[self.world.rank][: self.world.rank]))
        self.model.train()
        self.optimizer.zero_grad()
        parts = split_batch(batch, self.optim.accumulate)
        counts = [task.count(part) for part in parts]
        everyone = sum(counts)
        if self.world.size > 1:
            everyone = int(sum_over_ranks([everyone], self.world, self.device)[0])
        numbers: dict[str, Any] = {}
        try:
            for i, (part, n) in enumerate(zip(parts, counts, strict=True)):
                with unsynchronized(self.net, i + 1 < len(parts)), self._precision():
                    loss, more = task.loss(self.forward, part)
                    share = n / everyone  # the mean over all ranks and parts; wrappers average over ranks
                    self.scaler.scale(loss * (share * self.world.size)).backward()
                for name, value in {"train_loss": loss, **more}.items():
                    numbers[name] = numbers.get(name, 0) + torch.as_tensor(value).detach().float() * share
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory at epoch {epoch}, step {step} with {counts[0]} {task.unit} at a time: try "
                f"--optim.accumulate {2 * self.optim.accumulate}, --run.grad_checkpointing, or a smaller "
                f"--optim.batch_size; with --resume the run goes on from its last checkpoint ({error})"
            ) from None
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_grad or math.inf))
        values = torch.stack([norm.to(self.device).float(), *(v.to(self.device) for v in numbers.values())]).tolist()
        if self.world.size > 1:
            values[1:] = sum_over_ranks(values[1:], self.world, self.device)
        if not math.isfinite(values[1]) or (not math.isfinite(values[0]) and not self.scaler.is_enabled()):
            self._refuse(epoch, step, values[1], values[0], batch)
            return
        self.scaler.step(self.optimizer)  # leaves out a step whose float16 gradients overflowed
        self.scaler.update()
        state.step, state.count, state.bad = state.step + 1, state.count + everyone, 0
        for name, value in zip(numbers, values[1:], strict=True):
            state.sums[name] = state.sums.get(name, 0.0) + value * everyone
        if self.ema is not None:
            self.ema.update(self.model, step=state.step)

    def _batch(self, epoch: int, step: int) -> Batch:
        began = time.monotonic()
        batch = self.task.batch(epoch, step)
        self.waited += time.monotonic() - began
        return batch

    def _refuse(self, epoch: int, step: int, loss: float, norm: float, batch: Batch) -> None:
        """A loss or gradient that is not finite: the step is not taken, and what caused it is written down."""
        self.optimizer.zero_grad()
        index = batch.get("index") if isinstance(batch, dict) else None
        entry = dict(epoch=epoch, step=step, rank=self.world.rank, loss=str(loss), grad_norm=str(norm))
        entry["index"] = index.tolist() if isinstance(index, Tensor) else None
        with (self.folder / f"bad_batches{self.world.rank or ''}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.state.bad += 1
        self.state.step += 1
        self.bar.say(f"the loss became {loss} at epoch {epoch}, step {step}: the step is not taken")
        if self.state.bad >= self.run.bad_losses:
            self.state.step -= self.state.bad  # where resuming tries again, with the weights that were good
            self.state.bad = 0
            if self.spec is not None:
                self.save()
            raise TrainingError(
                f"the loss was not finite {self.run.bad_losses} times in a row, last at epoch {epoch}, step {step} of "
                f"{self.folder.name}: the samples are in {self.folder / 'bad_batches.jsonl'}, the weights before them "
                "in last/; try a lower --optim.lr, --optim.clip_grad 1 or --run.precision float32"
            )

    # What is said and kept

    def _evaluate(self) -> Row:
        state, evaluated = self.state, self.ema.module if self.ema is not None else self.model
        self.signals.at_once = self.world.size == 1
        try:
            if self.signals.asked:
                self._leave()
            score = self.task.evaluate(evaluated)
        except Stopped:
            self._leave()
        finally:
            self.signals.at_once = False
        seconds, items = self.pace
        row: Row = dict(epoch=state.epoch + 1, step=state.step, lr=self.optimizer.param_groups[0]["lr"])
        row |= {name: value / max(1, state.count) for name, value in state.sums.items()} or {"train_loss": math.nan}
        row |= score
        state.seconds = time.monotonic() - self.began
        row[f"{self.task.unit}_per_s"] = items / seconds if seconds else 0.0
        row["waiting"] = self.waited / seconds if seconds else 0.0
        if self.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        row["seconds"] = state.seconds
        if self.table is not None:
            self.table.add(row)
        state.epoch, state.rows, state.count, state.sums = state.epoch + 1, state.rows + 1, 0, {}
        better = self._better(score)
        if better:
            state.best, state.best_epoch = score[self.task.best[0]], state.epoch  # type: ignore[index]
        if self.spec is not None:
            if better:
                self.save("best", row)
            self.save("last", row)
        if self.on_epoch is not None:
            self.on_epoch(row, evaluated)
        return row

    def _better(self, score: dict[str, float]) -> bool:
        """A number that is not finite is never better."""
        if self.task.best is None:
            return False
        name, direction = self.task.best
        value, best = score[name], self.state.best
        if not math.isfinite(value):
            return False
        return best is None or (value > best if direction == "max" else value < best)

    def _patience_ended(self) -> bool:
        waited = self.state.epoch - self.state.best_epoch
        return 0 < self.run.patience <= waited

    def _tell(self, epoch: int) -> None:
        state = self.state
        loss = state.sums.get("train_loss", math.nan) / max(1, state.count)
        row = dict(epoch=epoch + 1, epochs=self.optim.epochs, step=state.step, train_loss=loss)
        self.bar.step(row)
        if time.monotonic() - self.last_call > 1:
            self.last_call = time.monotonic()
            self.progress(row)

    # Stopping and going on

    def _agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether a save is due, for all by the first one's clock."""
        minutes = (time.monotonic() - self.last_save) / 60
        due = self.world.first and 0 < self.run.save_minutes < minutes
        stop, save = sum_over_ranks([self.signals.asked, due], self.world, self.device)
        return bool(stop), bool(save)

    def _leave(self) -> None:
        self.signals.at_once = False
        self.save()
        self.bar.say(f"stopped at step {self.state.step} and saved; --resume goes on from there")
        raise Stopped(128 + (self.signals.asked or 15))

    def save(self, name: str = "last", row: Row | None = None) -> None:
        """Write a checkpoint. `model` are the weights that are evaluated: the averaged ones, where there are."""
        if self.spec is None:
            return
        kept = self.ema.module if self.ema is not None else self.model
        files = {"model": _tensors(kept)}
        state: dict[str, Any] = {}
        if name == "last":
            self.state.seconds = time.monotonic() - self.began
            if self.ema is not None:
                files["raw"] = _tensors(self.model)
            files["optimizer"] = {}
            state = asdict(self.state)
            state["optimizer"] = flatten(optimizer_state(self.model, self.optimizer), files["optimizer"])
            state["scaler"] = self.scaler.state_dict()
            self.last_save = time.monotonic()
        if self.world.first:
            write_checkpoint(
                self.folder / name,
                self.spec,
                files,
                grid=getattr(self.model, "train_grid", None),
                weights="averaged" if self.ema is not None else "trained",
                optim=asdict(self.optim),
                run=asdict(self.run),
                final=row,
                state=state,
                **{**self.task.describe(), **self.about},
            )

    def load(self) -> None:
        """Take up the state of `last`, on any number of processes."""
        folder = self.folder / "last"
        meta = read_meta(folder)
        if self.spec is not None and (meta["model"], meta["arguments"]) != (self.spec.kind, _json(self.spec.arguments)):
            raise CheckpointError(
                f"{folder} is a run of another model, {meta['model']} {meta['arguments']}; this one is "
                f"{self.spec.kind} {self.spec.arguments}: give another --run.out, or "
                f"--init {folder} to start from its weights"
            )
        digest = self.task.describe().get("digest")
        if digest != meta.get("digest"):
            raise CheckpointError(f"{folder} was trained on other data ({meta.get('digest')}, here {digest})")
        if "state" not in meta or "optimizer" not in meta["files"]:
            raise CheckpointError(f"{folder} holds a model but no state of its training: --init takes its weights")
        averaged = self.ema is not None
        if averaged != ("raw" in meta["files"]):
            raise CheckpointError(
                f"{folder} was trained {'without' if averaged else 'with'} --optim.ema; resume likewise"
            )
        tensors = read_tensors(folder, meta, "model")
        if self.ema is not None:
            _load(self.ema.module, tensors)
            tensors = read_tensors(folder, meta, "raw")
        _load(self.model, tensors)
        state = dict(meta["state"])
        moments = unflatten(state.pop("optimizer"), read_tensors(folder, meta, "optimizer"))
        load_optimizer(self.model, self.optimizer, moments)
        self.scaler.load_state_dict(state.pop("scaler"))
        self.state = State(**state)
        self.schedule.step_update(max(0, self.state.step - 1))  # what the last update was taken with

    def _precision(self):
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    from timm.optim import list_optimizers

    if optim.name not in list_optimizers():
        raise unknown("optimizer", optim.name, list_optimizers())
    more = {} if optim.betas is None else dict(betas=tuple(optim.betas))
    return create_optimizer_v2(
        model,
        opt=optim.name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        layer_decay=None if optim.layer_decay == 1 else optim.layer_decay,
        **more,
    )


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int) -> Any:
    if optim.schedule == "noam":
        return Noam(optimizer, optim.warmup_epochs * steps)
    if optim.schedule not in ("cosine", "tanh", "step", "poly"):  # those that need no memory of their own
        raise unknown("schedule", optim.schedule, ("cosine", "tanh", "step", "poly", "noam"))
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=optim.schedule,
        num_epochs=optim.epochs,
        min_lr=optim.lr / 100 if optim.min_lr is None else optim.min_lr,
        warmup_lr=optim.lr / 100,
        warmup_epochs=optim.warmup_epochs,  # parts of an epoch are fine
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return schedule


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer remembers of each parameter, by its name, in one piece."""
    names = {id(p): name for name, p in model.named_parameters()}
    state = {names[id(p)]: kept for p, kept in optimizer.state.items()}
    return {
        name: {key: whole(value) if isinstance(value, Tensor) else value for key, value in state[name].items()}
        for name, _ in model.named_parameters()
        if name in state
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    if strange := sorted(set(state) - set(parameters)):
        raise CheckpointError(f"the optimizer's state speaks of parameters that the model has not: {strange[:5]}")
    for name, kept in state.items():
        like = parameters[name]
        optimizer.state[like] = {
            key: sharded_like(value, like) if isinstance(value, Tensor) else value for key, value in kept.items()
        }


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU; a named device that is not there is an error."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32. "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name != "auto" and name not in PRECISIONS:
        raise ConfigError(f"precision must be auto, float32, bfloat16 or float16, got {name!r}")
    return PRECISIONS["bfloat16" if device.type == "cuda" else "float32"] if name == "auto" else PRECISIONS[name]


def checkpointing(model: Any) -> None:
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"{type(model).__name__} cannot compute its blocks again: leave run.grad_checkpointing out")
    model.set_grad_checkpointing(True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in model.state_dict().items()}


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    other = sorted(name for name in own.keys() ^ tensors.keys() if not name.endswith("_extra_state"))
    if other:
        raise CheckpointError(f"the checkpoint has other parameters: {other[:5]}")
    model.load_state_dict({name: sharded_like(value, own[name]) for name, value in tensors.items()})


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


__all__ = ["State", "Trainer", "fit", "keyed", "pick_device"]
