"""Where the tokens of a stock module are, and token terms in its layout."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..encodings import Dims, PositionEncoding, build
from ..errors import ConfigError
from ..grids import longer
from ..positions import Positions
from ..signal import Signal


@dataclass
class InputLayout:
    """Where the tokens of a stock module's input are.

    Args:
        grid: (length,) of a line, or the sizes of a grid, rows first. A shorter input takes the first places of a
            line, and a longer one makes it longer; any other grid must be met exactly.
        prefix: leading tokens that have no place.
        batch_first: whether the input is (N, L, E).
    """

    grid: tuple[int, ...]
    prefix: int
    batch_first: bool

    def of(self, x: Tensor) -> Positions:
        if x.is_nested:
            raise ConfigError("a nested tensor has no places here: pad it, and give the padding as a mask")
        n = x.shape[-2] if self.batch_first or x.ndim == 2 else x.shape[0]
        if len(self.grid) == 1:
            n -= self.prefix
            at = Positions.sequence(n, length=longer(n, self.grid[0]), device=x.device)
            return at.with_prefix(self.prefix)
        if n != math.prod(self.grid) + self.prefix:
            raise ConfigError(
                f"expected {'x'.join(map(str, self.grid))} tokens behind {self.prefix} without a place, got {n}; "
                "stock.set_grid(module, grid) names another grid"
            )
        return Positions.grid(self.grid, x.device).with_prefix(self.prefix)

    def between(self, query: Tensor, key: Tensor) -> tuple[Positions, Positions]:
        """Places of two sequences, on a line that is as long as the longer one."""
        q, k = self.of(query), self.of(key)
        if len(self.grid) > 1:
            return q, k
        extent = (longer(q.one_extent[0], k.one_extent[0]),)
        q, k = (Positions(at.coords, extent, at.prefix, at.on_grid) for at in (q, k))
        return q, k

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """(N, L) of an input; N is 1 without a batch."""
        if x.ndim == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def plus(self, x: Tensor, signal: Signal) -> Tensor:
        """x + signal.token in x's layout and dtype."""
        if signal.token is None:
            return x
        token = signal.token.to(x.dtype)
        if x.ndim == 2:
            return x + token[0]
        return x + (token if self.batch_first else token.transpose(0, 1))


class TokenPosition(nn.Module):
    """x -> x + the token term of an encoding, in the layout of the stock module that x is for.

    Args:
        encoding: a spec or an instance that gives token terms and nothing else.
        like: the stock module: `batch_first`, and the width a spec is built for, are read from it.
        grid, prefix: as for `attach`.

    Shape: (N, L, E), (L, N, E) or (L, E), whichever `like` takes.
    """

    def __init__(
        self, encoding: str | PositionEncoding, like: nn.Module, *, grid: int | tuple[int, ...], prefix: int = 0
    ) -> None:
        super().__init__()
        self.places = layout_of(like, grid, prefix)
        self.position = _token_only(instance_of(encoding, dims_of(like, self.places)))

    def forward(self, x: Tensor) -> Tensor:
        return self.places.plus(x, self.position(self.places.of(x)))


def add_position(
    embedding: Tensor,
    encoding: PositionEncoding,
    like: nn.Module,
    *,
    grid: int | tuple[int, ...],
    prefix: int = 0,
) -> Tensor:
    """`TokenPosition` as a function, for an encoding that lives elsewhere."""
    places = layout_of(like, grid, prefix)
    return places.plus(embedding, _token_only(encoding)(places.of(embedding)))


def set_grid(module: nn.Module, grid: int | tuple[int, ...]) -> None:
    """Name the grid of the inputs to come, for everything in `module` that has places; tables are not altered."""
    named = [p for part in module.modules() if isinstance(p := getattr(part, "places", None), InputLayout)]
    if not named:
        raise ConfigError(f"nothing in this {type(module).__name__} has places: attach an encoding first")
    for places in named:
        places.grid = _sizes(grid)


def _attention_of(module: nn.Module) -> nn.MultiheadAttention:
    """A stock attention of `module`; all of them have its width and layout."""
    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    if not attentions:
        raise ConfigError(f"{type(module).__name__} has no nn.MultiheadAttention to read batch_first and sizes from")
    if len({(part.batch_first, part.embed_dim) for part in attentions}) > 1:
        raise ConfigError(f"the attentions of this {type(module).__name__} differ in batch_first or width")
    return attentions[0]


def layout_of(module: nn.Module, grid: int | tuple[int, ...], prefix: int) -> InputLayout:
    return InputLayout(_sizes(grid), prefix, _attention_of(module).batch_first)


def dims_of(module: nn.Module, places: InputLayout, depth: int = 1) -> Dims:
    attn = _attention_of(module)
    return Dims(attn.embed_dim, attn.num_heads, places.grid, depth=depth)


def instance_of(encoding: str | PositionEncoding, dims: Dims) -> PositionEncoding:
    """The encoding of a spec; a copy of an instance, so that copies of a layer share nothing."""
    return build(encoding, dims) if isinstance(encoding, str) else copy.deepcopy(encoding)


def _sizes(grid: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    if not sizes or any(size < 1 for size in sizes):
        raise ConfigError(f"a grid is a length or the sizes of its axes, each at least 1, got {grid}")
    return sizes


def table_dtype(like: Tensor) -> torch.dtype:
    """Tables are float32 beside half-precision weights, float64 beside float64."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _token_only(encoding: PositionEncoding) -> PositionEncoding:
    if encoding.gives - {"token"}:
        raise ConfigError(f"{type(encoding).__name__} gives {sorted(encoding.gives)}, of which only token can be added")
    return encoding
