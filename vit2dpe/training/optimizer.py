"""The optimizer and its schedule, timm's both, and what they remember, by the names of the parameters."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..errors import CheckpointError, unknown
from .distributed import full_tensor, shard_like
from .schedules import Noam
from .settings import OptimConfig

SCHEDULES = ("cosine", "tanh", "step", "poly", "noam")  # those that need no memory of their own


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
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
    if optim.schedule not in SCHEDULES:
        raise unknown("schedule", optim.schedule, SCHEDULES)
    if optim.schedule == "noam":
        return Noam(optimizer, optim.warmup_epochs * steps)
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
        name: {key: full_tensor(value) if isinstance(value, Tensor) else value for key, value in state[name].items()}
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
            key: shard_like(value, like) if isinstance(value, Tensor) else value for key, value in kept.items()
        }
