"""timm's optimizers and schedules, and the optimizer's state by the names of the parameters.

Not `torch.distributed.checkpoint.state_dict`: there an empty state is filled by a step of the optimizer, which counts
as an update and moves the weights of MADGRAD, so that a training saved before its first update would not go on to the
same bits; and reading the state of a ViT-Ti takes 60 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from ..encodings import encoding_parameters
from ..errors import CheckpointError, unknown
from .distributed import full_tensor, shard_like
from .freezing import freeze
from .settings import OptimConfig

SCHEDULES = ("cosine", "tanh", "step", "poly", "noam")  # functions of the update's number: nothing to save
FUSED = ("adam", "adamw", "momentum", "nesterov", "sgd")  # those of torch: one launch for all parameters on CUDA
OptimizerState = dict[str, dict[str, Any]]  # tensors and numbers by their name, by the parameter's


class Noam(Scheduler):
    """Inverse square root with linear warm-up, arXiv 1706.03762, section 5.3.

        lr(s) = peak · min(s / w, √(w / s)),   s = 1, 2, ... the number of the update, w updates of warm-up

    The paper's D^-0.5 · min(s^-0.5, s · w^-1.5) is this with peak = (D w)^-0.5; here the peak is the optimizer's rate,
    so that schedules are compared at one `optim.lr`. Without warm-up it falls from the first update on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.warmup = max(1.0, warmup)

    def _get_lr(self, t: int) -> list[float]:
        s = t + 1
        return [peak * min(s / self.warmup, (self.warmup / s) ** 0.5) for peak in self.base_values]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """timm's optimizer of the parameters that are trained; those of `optim.freeze` are frozen here at the latest."""
    freeze(model, optim.freeze)
    if optim.name not in list_optimizers():
        raise unknown("optimizer", optim.name, list_optimizers())
    more: dict[str, Any] = {} if optim.betas is None else dict(betas=tuple(optim.betas))
    if takes_fused(optim.name, next(model.parameters()).device):
        more["fused"] = True
    optimizer = create_optimizer_v2(
        model,
        opt=optim.name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        layer_decay=None if optim.layer_decay == 1 else optim.layer_decay,
        **more,
    )
    if optim.position_lr != 1:
        _scale_encodings(model, optimizer, optim.position_lr)
    return optimizer


def _scale_encodings(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give what encodings learn groups of their own, whose rate the schedule multiplies by `factor` (`lr_scale`)."""
    named = dict(model.named_parameters())
    own = {id(named[name]) for name in encoding_parameters(model) if name in named}
    for group in list(optimizer.param_groups):
        inside = [one for one in group["params"] if id(one) in own]
        group["params"] = [one for one in group["params"] if id(one) not in own]
        if inside:
            scale = group.get("lr_scale", 1.0) * factor
            optimizer.add_param_group({**group, "params": inside, "lr_scale": scale, "lr": group["lr"]})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def takes_fused(name: str, device: torch.device) -> bool:
    """Whether the optimizer's fused step is taken. It is also the one that leaves out a step without the host."""
    return name in FUSED and device.type == "cuda"


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, steps: int) -> Scheduler:
    if optim.schedule not in SCHEDULES:
        raise unknown("schedule", optim.schedule, SCHEDULES)
    if optim.schedule == "noam":
        return Noam(optimizer, optim.warmup * steps)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=optim.schedule,
        num_epochs=optim.epochs,
        min_lr=optim.lr / 100 if optim.min_lr is None else optim.min_lr,
        warmup_lr=optim.lr / 100,
        warmup_epochs=optim.warmup,  # parts of an epoch are fine
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return schedule


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, copy: Callable[[Tensor], Tensor] = full_tensor
) -> OptimizerState:
    """The optimizer's state of each parameter, by its name, unsharded, on the CPU; that of its groups under "" """
    states = {
        name: {key: copy(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        for name, parameter in model.named_parameters()
        if (state := optimizer.state.get(parameter)) is not None
    }
    steps = [group["step"] for group in optimizer.param_groups if "step" in group]  # LAMB counts here
    return states | ({"": {"step": steps}} if steps else {})


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """The inverse of `optimizer_state`, for any number of processes."""
    parameters = dict(model.named_parameters())
    if extra := sorted(set(state) - set(parameters) - {""}):
        raise CheckpointError(f"the optimizer's state speaks of parameters that the model has not: {extra[:5]}")
    for group, step in zip(optimizer.param_groups, state.get("", {}).get("step", ()), strict=False):
        group["step"] = step
    fused = bool(optimizer.defaults.get("fused"))  # counts steps on the device
    for name, like in parameters.items():
        if (values := state.get(name)) is None:
            continue
        optimizer.state[like] = {
            key: shard_like(value, like, scalars=fused) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
