"""Whatever names, is or builds an encoding, as functions from `Dims`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from ..contextual import Contextual
from ..errors import ConfigError
from ..positions import Positions
from .base import PositionEncoding
from .registry import Dims, arguments_of, build

Make = Callable[[Dims], PositionEncoding]
Encoding = str | PositionEncoding | type[PositionEncoding] | Make


def makers(encoding: Encoding, grids: Mapping[int, tuple[int, ...]], skip: bool = False) -> list[tuple[Make, Dims]]:
    """What builds the encoding, and the sizes to build it for, on each of the grids.

    Args:
        encoding: a spec; an encoding, of which copies are built; its class, whose arguments are found by their names;
            or a function from Dims.
        skip: leave out grids that an encoding which is built already does not accept, as long as it accepts one.

    Raises:
        ConfigError: for anything else, and for a class with arguments that no model knows.
    """
    if isinstance(encoding, PositionEncoding):
        return [(lambda dims: copy.deepcopy(encoding), dims) for dims in _accepted(encoding, grids, skip)]
    if isinstance(encoding, nn.Module) or not (isinstance(encoding, str) or callable(encoding)):
        kind = type(encoding).__name__
        raise ConfigError(f"an encoding is a spec, a PositionEncoding, its class or a function from Dims, got {kind}")

    def make(dims: Dims) -> PositionEncoding:
        if isinstance(encoding, str):
            return build(encoding, dims)
        made = encoding(**arguments_of(encoding, dims)) if isinstance(encoding, type) else encoding(dims)
        if not isinstance(made, PositionEncoding):
            raise ConfigError(f"{encoding!r} builds a {type(made).__name__}, which is no PositionEncoding")
        return made

    return [(make, Dims(width=36, heads=3, grid=grid, depth=4)) for grid in grids.values()]


def _accepted(encoding: PositionEncoding, grids: Mapping[int, tuple[int, ...]], skip: bool) -> list[Dims]:
    """The sizes that an encoding was built for, read from its Signal, on each grid that it accepts."""
    found, refused = [], None
    for grid in grids.values():
        try:
            signal = copy.deepcopy(encoding).eval()(Positions.grid(grid))
            vectors = [term for term in signal.bias if isinstance(term, Contextual)]
            biases = [term.dense() for term in signal.bias if not isinstance(term, Contextual)]
        except ValueError as error:
            if not skip:
                raise
            refused = error
            continue
        turn, token = signal.q_rotation, signal.token
        head_dim = 2 * turn.cos.shape[-1] if turn is not None else vectors[0].vectors[0].shape[-1] if vectors else 12
        each = [*(bias.shape[1] for bias in biases), *(term.heads for term in vectors)]
        heads = max([1, *each, *([] if turn is None else [turn.cos.shape[1]])])
        if token is not None and turn is not None:
            heads = max(heads, token.shape[-1] // head_dim)
        found.append(Dims(heads * head_dim if token is None else token.shape[-1], heads, grid, depth=4))
    if refused is not None and not found:
        raise refused
    return found
