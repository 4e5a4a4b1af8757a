"""`optim.freeze`: the leading blocks of a model, and everything before them, keep their weights.

Layers are counted as for layer decay, by the model's `group_matcher`: 0 is the stem (patches, tokens, encodings of the
whole model), i the i-th block with its own encoding, the last one with the norm behind it. Frozen parameters have no
gradient and no state of the optimizer. Modules that hold nothing else are in evaluation mode while the rest is trained:
no dropout and no stochastic depth in them, and batch norms keep their statistics (as timm's `freeze` does, which
replaces them instead).
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models import group_parameters
from torch import nn

from ..errors import ConfigError


def frozen_parameters(model: nn.Module, blocks: int) -> list[str]:
    """The parameters of the first `blocks` blocks and of what is before them, by name; none for 0 blocks.

    Raises:
        ConfigError: for more blocks than there are, for a model without a stack of blocks, and if nothing is left.
    """
    if not blocks:
        return []
    layers = _layers(model)
    if blocks > (depth := len(layers) - 2):
        raise ConfigError(
            f"optim.freeze: {type(model).__name__} has {depth} blocks, got {blocks}; {depth} leaves the head alone"
        )
    names = [name for layer in layers[: blocks + 1] for name in layer]
    if len(names) == sum(1 for _ in model.parameters()):
        raise ConfigError(f"optim.freeze {blocks} leaves no parameter of this {type(model).__name__} to train")
    return names


def freeze(model: nn.Module, blocks: int) -> list[nn.Module]:
    """Freeze parameters in place; the outermost modules that hold no others, for `eval()` in every step."""
    names = set(frozen_parameters(model, blocks))
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return list(_held(model)) if names else []


def _held(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.children():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield part
        else:
            yield from _held(part)


def _layers(model: nn.Module) -> list[list[str]]:
    """Names of parameters: of the stem, of each block, of what is behind them."""
    if callable(matcher := getattr(model, "group_matcher", None)):
        groups: dict[int, list[str]] = group_parameters(model, matcher(coarse=False))
        return [groups[i] for i in sorted(groups)]
    if not isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList):
        raise ConfigError(f"optim.freeze holds the first of a stack of blocks, and {type(model).__name__} is none")
    layers: list[list[str]] = [[] for _ in range(len(blocks) + 2)]
    place = 0
    for name, _ in model.named_parameters():  # in the order of the model
        if name.startswith("blocks."):
            place = 1 + int(name.split(".")[1])
        elif place and not name.startswith("norm."):
            place = len(layers) - 1
        layers[place].append(name)
    return layers
