"""`run.graph`: forward and backward pass as CUDA graphs, which the device replays without the host.

`torch.cuda.make_graphed_callables` captures them; loss, clipping and optimizer stay outside. A graph takes batches of
one size. Random numbers come from the device's generator, which is seeded for each step as it is without graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .distributed import World
from .settings import RunConfig


class GraphedModel(nn.Module):
    """A model whose passes in training are captured at the first batch and replayed for the others.

    Args:
        module: on its device. Evaluations do not go through here.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.replay: Callable[..., Any] | None = None
        self.captured: list[object] = []

    def forward(self, *given: Tensor | float | None) -> Any:
        """What the model makes of these arguments.

        Raises:
            ConfigError: for tensors of another shape than the first ones, and other numbers.
        """
        tensors = [value for value in given if isinstance(value, Tensor)]
        kind: list[object] = [(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in given]
        if self.replay is None:
            self.replay, self.captured = _capture(self.module, given, tensors), kind
        if kind != self.captured:
            raise ConfigError(
                f"run.graph takes batches of one size: the first was {_shown(self.captured)}, this one is "
                f"{_shown(kind)}; leave out the last batch of an epoch (optim.drop_last) and train at one size"
            )
        return self.replay(*tensors)


class _Call(nn.Module):
    """The model as a function of tensors alone; what else it is given is a constant of the graph."""

    def __init__(self, module: nn.Module, given: tuple[Tensor | float | None, ...]) -> None:
        super().__init__()
        self.module = module
        self.fixed = tuple(None if isinstance(value, Tensor) else value for value in given)
        self.places = [i for i, value in enumerate(given) if isinstance(value, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        given: list[Any] = list(self.fixed)
        for i, tensor in zip(self.places, tensors, strict=True):
            given[i] = tensor
        return self.module(*given)


def _capture(module: nn.Module, given: tuple[Tensor | float | None, ...], tensors: list[Tensor]) -> Callable[..., Any]:
    """The graphed call; the first step then draws what it draws in a run that was resumed there."""
    call, device = _Call(module, given), tensors[0].device
    call.training = module.training  # of itself alone: blocks that are frozen stay in evaluation mode
    kept = [tensor.clone() for tensor in tensors]  # the graph's own inputs, which every batch is copied into
    with torch.random.fork_rng([device.index] if device.type == "cuda" else [], device_type=device.type):
        graphed: Callable[..., Any] = torch.cuda.make_graphed_callables(call, tuple(kept), allow_unused_input=True)
    return graphed


def _shown(kind: list[object]) -> str:
    return ", ".join(str(list(value[0])) if isinstance(value, tuple) else str(value) for value in kind)


def check_graph(run: RunConfig, device: torch.device, world: World) -> None:
    """Refuse what no graph is made of.

    Raises:
        ConfigError: naming what stands against it.
    """
    if device.type != "cuda":
        raise ConfigError(f"run.graph needs a CUDA device, this training is on {device.type}: leave it out")
    if world.size > 1:
        raise ConfigError("run.graph is for one process: leave it out under torchrun")
    for name, on in dict(compile=run.compile, grad_checkpointing=run.grad_checkpointing).items():
        if on:
            raise ConfigError(f"run.graph goes without run.{name}: leave out one of them")
