"""`run.compile`: the whole model as one graph, or each of its blocks, which share one graph and its compilation.

A graph of one block serves all of them where what differs from block to block is a tensor, as weights are, which are
inputs of the graph. A rate of stochastic depth and a slope by depth are numbers in Python, and each would be a graph;
while a step runs they are 0-d tensors instead. Outside of a step the model is as it was built, for evaluations and
checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..encodings.base import PositionEncoding
from ..errors import ConfigError

GRAPHS = (
    64  # of one class of blocks in a process, in which a study trains one encoding after the other; torch stops at 8
)


class TensorDropPath(DropPath):
    """timm's stochastic depth (arXiv 1603.09382) whose rate is a tensor.

        x * kept / keep,   kept ~ Bernoulli(keep) for each sample

    It draws one number a sample, uniform, from the global generator of the device; timm draws another sequence.

    Args:
        like: the layer that it stands for; a rate of 0 keeps every sample as it is.
        device: of the rate.
    """

    def __init__(self, like: nn.Module, device: torch.device) -> None:
        super().__init__()
        rate = getattr(like, "drop_prob", None) or 0.0
        self.keep, self.scaled = torch.tensor(1.0 - rate, device=device), getattr(like, "scale_by_keep", True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = torch.rand(shape, device=x.device) < self.keep
        factor = kept / self.keep if self.scaled else kept
        return x * factor.to(x.dtype)


class CompiledBlocks:
    """The blocks of a model, each compiled; `in_use` is a context in which they are.

    Args:
        model: on its device, not yet wrapped.

    Raises:
        ConfigError: for a model without a list of blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        blocks = blocks_of(model)
        if not blocks:
            raise ConfigError(f"run.compile blocks: {type(model).__name__} has no list of blocks; take model")
        device = next(model.parameters()).device
        self.forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = [(b, torch.compile(b.forward)) for b in blocks]
        self.layers: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self.numbers: list[tuple[nn.Module, str, float, Tensor]] = []
        drops = {name for block in blocks for name, part in block.named_modules() if isinstance(part, DropPath)}
        for block in blocks:
            for name, part in block.named_modules():
                owner, _, own = name.rpartition(".")
                if name in drops and isinstance(part, DropPath | nn.Identity):
                    self.layers.append((block.get_submodule(owner), own, part, TensorDropPath(part, device)))
                for number in part.block_numbers if isinstance(part, PositionEncoding) else ():
                    value = getattr(part, number)
                    self.numbers.append((part, number, value, torch.tensor(value, dtype=part.dtype, device=device)))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        try:
            for block, forward in self.forwards:
                vars(block)["forward"] = forward
            for owner, name, before, layer in self.layers:
                setattr(owner, name, layer.train(before.training))
            for owner, name, _, number in self.numbers:
                setattr(owner, name, number)
            with _more_graphs():
                yield
        finally:
            for block, _ in self.forwards:
                vars(block).pop("forward", None)
            for owner, name, layer, _ in self.layers:
                setattr(owner, name, layer)
            for owner, name, value, _ in self.numbers:
                setattr(owner, name, value)


@contextmanager
def _more_graphs() -> Iterator[None]:
    """Let torch compile up to `GRAPHS`, where it has a public name for its limit."""
    from torch.compiler import config

    limit = getattr(config, "recompile_limit", None)
    if limit is None:
        yield
        return
    config.recompile_limit = max(GRAPHS, limit)
    try:
        yield
    finally:
        config.recompile_limit = limit


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model: what a ModuleList or a Sequential holds of one class, the innermost of these.

    Of a ViT its blocks, of a MAE those of encoder and decoder, of a Swin those of its stages, and so of timm's models.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList | nn.Sequential) and _repeats(part)]
    innermost = [outer for outer in lists if not any(part in lists for part in outer.modules() if part is not outer)]
    return [block for part in innermost for block in part.children()]


def _repeats(layers: nn.Module) -> bool:
    """Whether all that it holds is of one class that has parts of its own, as a block has and a linear map has not."""
    parts = list(layers.children())
    own = all(any(part.children()) and not isinstance(part, PositionEncoding) for part in parts)
    return own and len({type(part) for part in parts}) == 1
