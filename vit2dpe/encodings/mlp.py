"""Small networks inside encodings, computed in float32 at least, whatever their parameters were cast to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class PositionLinear(NonDynamicallyQuantizableLinear):
    """An nn.Linear of a network of positions, which quantization leaves alone by its type.

    torchao's `quantize_` without a filter takes every nn.Linear but torch's own class of this kind, and torch's
    `quantize_dynamic` takes exact types. The networks run once for each offset, not for each token: nothing is gained.
    """


def lifted(parameter: Tensor) -> Tensor:
    """A parameter in float32, or float64 where it is."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def lifted_mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers` of x (..., in), linear maps with lifted weights; x is cast to them."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            weight = lifted(layer.weight)
            bias = None if layer.bias is None else lifted(layer.bias)
            x = nn.functional.linear(x.to(weight.device, weight.dtype), weight, bias)
        else:
            x = layer(x)
    return x


def redraw(layers: nn.Sequential) -> None:
    """Draw every layer's parameters anew."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
