"""One update of the weights: forward and backward over the parts of a batch, clipping, optimizer, running average."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import ConfigError, TrainingError
from ..seeding import derive_seed
from .compiling import CompiledBlocks
from .devices import pick_device, precision
from .distributed import World, parallelize, sum_on_device, sum_over_ranks, unsynchronized, whole
from .freezing import freeze
from .graphs import GraphedModel, check_graph
from .late import StepResult
from .optimizer import make_optimizer, make_schedule
from .settings import OptimConfig, RunConfig
from .task import B, Task, split_batch, tensors_of


def nothing() -> None:
    """Do nothing."""


class Updater(Generic[B]):
    """Model (on its device, wrapped and compiled), optimizer, schedule, gradient scaler and running average.

    With a fused optimizer the device itself leaves out a step whose loss or gradient is not finite (`late`), and the
    host reads the numbers when it likes; with any other it reads them before the optimizer's step.
    """

    def __init__(self, model: nn.Module, task: Task[B], optim: OptimConfig, run: RunConfig, world: World) -> None:
        self.task, self.optim, self.run, self.world = task, optim, run, world
        self.device = pick_device(run.device)
        self.autocast = precision(run.precision, self.device)
        if run.graph:
            check_graph(run, self.device, world)
        if run.grad_checkpointing:
            enable_checkpointing(model)
        self.model = model.to(self.device)
        self.ema = None
        if optim.ema:
            self.ema = ModelEmaV3(model, decay=optim.ema, use_warmup=optim.ema_warmup)
        self.frozen = freeze(self.model, optim.freeze)  # before it is wrapped: no gradients are exchanged for them
        self.blocks = CompiledBlocks(self.model) if run.compile == "blocks" else None
        self.net = parallelize(self.model, run.parallel, world)
        if self.ema is not None and run.parallel == "fsdp":
            self.ema.module = parallelize(self.ema.module, "fsdp", world)
        self.forward: Any = self.net  # torch types a compiled module as a function
        if run.compile is True:
            self.forward = torch.compile(self.net)
        elif run.graph:
            self.forward = GraphedModel(self.net)
        self.optimizer = make_optimizer(self.model, optim)
        self.schedule = make_schedule(self.optimizer, optim, task.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        sharded = run.parallel == "fsdp" and world.size > 1  # its optimizer does not take a flag that is not sharded
        self.late = bool(self.optimizer.defaults.get("fused")) and not sharded
        self.not_averaged: tuple[StepResult, int] | None = None

    @property
    def averaged(self) -> nn.Module | None:
        """The model of averaged weights, if they are kept."""
        return None if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The schedule's; with layer decay that of the last layers, the others have less; encodings may have more."""
        return max(group["lr"] / max(1.0, group.get("lr_scale", 1.0)) for group in self.optimizer.param_groups)

    def step(self, batch: B, epoch: int, step: int, done: int, before: Callable[[], None] = nothing) -> StepResult:
        """Update the weights by this rank's share of a batch, unless loss or gradient is not finite.

        Args:
            epoch, step: where the training is.
            done: updates before this one.
            before: called when forward and backward pass are queued and the weights are still those of the step before,
                whose numbers can be read then: the device has work meanwhile.

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
            items = int(sum_over_ranks([items], self.world)[0])
        if not items:
            before()
            return StepResult((), None, 0)
        if self.world.size == 1:  # the mean of a part without an item is 0 / 0; other ranks wait for each backward pass
            parts, counts = [part for part, n in zip(parts, counts, strict=True) if n], [n for n in counts if n]
        sums: dict[str, Tensor] = {}
        try:
            for i, (part, n) in enumerate(zip(parts, counts, strict=True)):
                last = i + 1 == len(parts) or self.world.size == 1
                together = nullcontext() if last else unsynchronized(self.net)
                compiled = nullcontext() if self.blocks is None else self.blocks.in_use()
                with together, compiled, self._precision():
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
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_grad or math.inf))
        values = torch.stack([norm.to(self.device).float(), *(v.to(self.device) for v in sums.values())])
        if self.world.size > 1:
            values = sum_on_device(values, self.world)
        result = StepResult(tuple(sums), values, items, half=self.scaler.is_enabled())
        before()
        self.settle()
        if self.late:
            self._step_if(values[1 if result.half else slice(2)].isfinite().all())
        elif result.finite:
            self.scaler.step(self.optimizer)  # leaves out a step whose float16 gradients overflowed
        self.scaler.update()  # after a batch that was left out too: else the next one cannot be unscaled
        self.not_averaged = None if self.ema is None else (result, done + 1)
        if not self.late:
            self.settle()
        return result

    def settle(self) -> None:
        """Let the running average follow the last step, if it was taken; the weights are still those of after it."""
        if self.ema is not None and self.not_averaged is not None:
            result, done = self.not_averaged
            self.not_averaged = None
            if result.finite:
                self.ema.update(self.model, step=done)

    def _step_if(self, finite: Tensor) -> None:
        """A step of a fused optimizer, which leaves weights and state as they are where `found_inf` is 1."""
        bad = 1 - finite.float()

        def mark(optimizer: torch.optim.Optimizer, *_: object) -> None:
            found = torch.maximum(bad, vars(optimizer)["found_inf"]) if self.scaler.is_enabled() else bad
            vars(optimizer)["found_inf"] = found

        hook = self.optimizer.register_step_pre_hook(mark)
        try:
            self.scaler.step(self.optimizer)
        finally:
            hook.remove()

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
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast, cache_enabled=not self.run.graph)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, by timm's `set_grad_checkpointing`."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(f"{type(model).__name__} cannot compute its blocks again: leave run.grad_checkpointing out")
    switch(True)
