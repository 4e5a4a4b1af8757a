"""One update of the weights: forward and backward over the parts of a batch, clipping, optimizer, running average."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import ConfigError, TrainingError
from ..seeding import derive_seed
from .devices import pick_device, precision
from .distributed import World, full_tensor, parallelize, sum_over_ranks, unsynchronized
from .freezing import freeze
from .optimizer import make_optimizer, make_schedule
from .settings import OptimConfig, RunConfig
from .task import B, Task, split_batch, tensors_of


class StepResult(NamedTuple):
    """Numbers of one update.

    Args:
        numbers: train_loss, and those that the task adds: means over the items of all ranks; none without an item.
        norm: of the gradient, before it is clipped.
        items: how many items, over all ranks.
        finite: whether loss and gradient were; if not, no step was taken. In float16 whether the loss was: a gradient
            that overflowed is left out by the scaler, which then halves its factor. True of a batch without an item,
            such as one of masked tokens in which none is hidden, which takes no step either.
    """

    numbers: dict[str, float]
    norm: float
    items: int
    finite: bool


class Updater(Generic[B]):
    """Model (on its device, wrapped and compiled), optimizer, schedule, gradient scaler and running average."""

    def __init__(self, model: nn.Module, task: Task[B], optim: OptimConfig, run: RunConfig, world: World) -> None:
        self.task, self.optim, self.run, self.world = task, optim, run, world
        self.device = pick_device(run.device)
        self.autocast = precision(run.precision, self.device)
        if run.grad_checkpointing:
            enable_checkpointing(model)
        self.model = model.to(self.device)
        self.ema = None
        if optim.ema:
            self.ema = ModelEmaV3(model, decay=optim.ema, use_warmup=optim.ema_warmup)
        self.frozen = freeze(self.model, optim.freeze)  # before it is wrapped: no gradients are exchanged for them
        self.net = parallelize(self.model, run.parallel, world)
        if self.ema is not None and run.parallel == "fsdp":
            self.ema.module = parallelize(self.ema.module, "fsdp", world)
        self.forward: Any = torch.compile(self.net) if run.compile else self.net  # torch types a module as a function
        self.optimizer = make_optimizer(self.model, optim)
        self.schedule = make_schedule(self.optimizer, optim, task.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)

    @property
    def averaged(self) -> nn.Module | None:
        """The model of averaged weights, if they are kept."""
        return None if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The schedule's; with layer decay that of the last layers, the others have less."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, batch: B, epoch: int, step: int, done: int) -> StepResult:
        """Update the weights by this rank's share of a batch, unless loss or gradient is not finite.

        Args:
            epoch, step: where the training is.
            done: updates before this one.

        Raises:
            TrainingError: if memory runs out.
        """
        # Dropout, stochastic depth, encodings that draw in training. One process draws as it always did.
        torch.manual_seed(derive_seed(self.run.seed, epoch, done, "model", *[self.world.rank][: self.world.rank]))
        self.model.train()
        for module in self.frozen:
            module.eval()
        self.optimizer.zero_grad()
        parts = split_batch(batch, self.optim.accumulate)
        counts = [self.task.count(part) for part in parts]
        items = sum(counts)
        if self.world.size > 1:
            items = int(sum_over_ranks([items], self.world, self.device)[0])
        if not items:
            return StepResult({}, 0.0, 0, True)
        if self.world.size == 1:  # the mean of a part without an item is 0 / 0; other ranks wait for each backward pass
            parts, counts = [part for part, n in zip(parts, counts, strict=True) if n], [n for n in counts if n]
        sums: dict[str, Tensor] = {}
        try:
            for i, (part, n) in enumerate(zip(parts, counts, strict=True)):
                last = i + 1 == len(parts) or self.world.size == 1
                with nullcontext() if last else unsynchronized(self.net), self._precision():
                    loss, more = self.task.loss(self.forward, part) if n else self._nothing(part)
                    share = n / items  # the mean over all ranks and parts; wrappers average over ranks
                    self.scaler.scale(loss * (share * self.world.size)).backward()
                for name, value in {"train_loss": loss, **more}.items():
                    mean = torch.as_tensor(value).detach().float() * share
                    sums[name] = sums[name] + mean if name in sums else mean
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory at epoch {epoch}, step {step} with {counts[0]} {self.task.unit} at a time: try "
                f"--optim.accumulate {2 * self.optim.accumulate}, --run.grad_checkpointing, or a smaller "
                f"--optim.batch_size; with --resume the run goes on from its last checkpoint ({error})"
            ) from None
        self.scaler.unscale_(self.optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_grad or math.inf))
        values = torch.stack([norm.to(self.device).float(), *(v.to(self.device) for v in sums.values())]).tolist()
        if self.world.size > 1:
            values[1:] = sum_over_ranks(values[1:], self.world, self.device)
        finite = math.isfinite(values[1]) and (math.isfinite(values[0]) or self.scaler.is_enabled())
        if finite:
            self.scaler.step(self.optimizer)  # leaves out a step whose float16 gradients overflowed
            if self.ema is not None:
                self.ema.update(self.model, step=done + 1)
        self.scaler.update()  # after a batch that was left out too: else the next one cannot be unscaled
        return StepResult(dict(zip(sums, values[1:], strict=True)), values[0], items, finite)

    def _nothing(self, part: B) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Zero with zero gradients, through the same forward and backward passes, in which other ranks wait."""
        outputs: list[Tensor] = []
        watch = self.forward.register_forward_hook(lambda module, given, found: outputs.extend(tensors_of(found)))
        try:
            _, more = self.task.loss(self.forward, part)
        finally:
            watch.remove()
        zeros = [(output.float() * 0).sum() for output in outputs if output.requires_grad]
        return torch.stack(zeros).sum(), dict.fromkeys(more, 0.0)

    def _precision(self) -> nullcontext[None] | torch.autocast:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, by timm's `set_grad_checkpointing`."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(f"{type(model).__name__} cannot compute its blocks again: leave run.grad_checkpointing out")
    switch(True)
