"""Attention inside of the segments of packed rows, those of one kind together as a batch: no N x N of a row.

Each kind takes whatever `attend` takes for such a batch. Signals of a row (rotations, temperatures and biases of its
tokens) are cut to the segments too: places, rows and columns are, so that a bias is computed for pairs of a segment
alone.

Legend: B rows, N tokens of a row, H heads, G segments of a kind, L tokens of each, Dh head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contextual import Contextual
from ..packed import Grouped
from ..positions import Positions
from ..segments import Segments
from ..signal import Bias, Dense, Distance, LowRank, Rotation, Signal, Table
from .masks import Causal


class Attend(Protocol):
    """Attention of an ordinary batch, see `functional.attend`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        signal: Signal,
        mask: Tensor | Causal | None,
        scale: float | None,
        dropout: float,
    ) -> Tensor: ...


class Kind(NamedTuple):
    """What attention takes of the segments of one kind: q, k, v (G, H, L, Dh), Signal and mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    signal: Signal
    mask: Tensor | Causal | None


def attend(
    one: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signal: Signal,
    segments: Segments,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """(B, H, N, Dv): each segment by itself, 0 for tokens of none; `one` does it for the segments of each kind."""
    segments = segments.of_rows(q.shape[0])
    parts = (
        one(kind.q, kind.k, kind.v, kind.signal, kind.mask, scale, dropout).transpose(1, 2)  # (G, L, H, Dv)
        for kind in kinds(q, k, v, signal, segments)
    )
    row: Tensor = segments.join(parts, v.transpose(1, 2)[0]).unflatten(0, segments.numbers.shape)
    return row.transpose(1, 2)


def kinds(q: Tensor, k: Tensor, v: Tensor, signal: Signal, segments: Segments) -> Iterator[Kind]:
    """The parts of q, k, v (B, H, N, Dh), Signal and mask that belong to each kind of segments.

    Args:
        segments: of as many rows.

    Raises:
        ValueError: for another number of tokens.
    """
    b, _, n, _ = q.shape
    if any(tuple(x.shape[:3:2]) != tuple(segments.numbers.shape) for x in (q, k, v)):
        raise ValueError(
            f"these segments are of {segments.numbers.shape[1]} tokens in {segments.numbers.shape[0]} rows, queries "
            f"and keys alike, got {n} queries and {k.shape[2]} keys in {b} rows"
        )
    tensors = zip(*(segments.split(x.transpose(1, 2).flatten(0, 1)) for x in (q, k, v)), strict=True)
    masks = segments.inside or (None,) * len(segments.groups)
    for parts, own, inside, group in zip(tensors, _signals(signal, segments), masks, segments.groups, strict=True):
        mask: Tensor | Causal | None = inside
        if segments.causal:
            order = Causal(Positions.sequence(group.length, device=segments.numbers.device))
            mask = order if inside is None else inside & order.matrix()
        one, other, values = (x.transpose(1, 2) for x in parts)
        yield Kind(one, other, values, own, mask)


def _signals(signal: Signal, segments: Segments) -> list[Signal]:
    """The Signal of each kind of segments."""
    turns = [_rotations(rotation, segments) for rotation in (signal.q_rotation, signal.k_rotation)]
    factors = _factors(signal.temperature, segments)
    found = [
        Signal(q_rotation=q, k_rotation=k, temperature=factor) for q, k, factor in zip(*turns, factors, strict=True)
    ]
    for term in signal.bias:
        parts = term.signals if isinstance(term, Grouped) else [Signal(bias=(x,)) for x in _cut(term, segments)]
        found = [one.plus(part) for one, part in zip(found, parts, strict=True)]
    return found


def _rows(x: Tensor, segments: Segments) -> list[Tensor]:
    """(B|1, 1|H, N, r) -> (G, 1|H, L, r) of each kind."""
    tokens = x.expand(segments.numbers.shape[0], -1, -1, -1).transpose(1, 2).flatten(0, 1)
    return [part.transpose(1, 2) for part in segments.split(tokens)]


def _rotations(rotation: Rotation | None, segments: Segments) -> list[Rotation | None]:
    if rotation is None:
        return [None] * len(segments.groups)
    return [Rotation(*pair) for pair in zip(*(_rows(x, segments) for x in rotation), strict=True)]


def _factors(temperature: float | Tensor | None, segments: Segments) -> list[float | Tensor | None]:
    if not isinstance(temperature, Tensor) or temperature.numel() == 1:
        return [temperature] * len(segments.groups)
    return [*_rows(temperature.expand(-1, -1, segments.numbers.shape[1], -1), segments)]


def _cut(term: Bias, segments: Segments) -> list[Bias]:
    """A bias of a row as those of each kind of its segments."""
    if isinstance(term, Table | Distance | Contextual):
        q = _places(term.q, segments)
        k = q if term.k is term.q else _places(term.k, segments)
        return [term._replace(q=one, k=other) for one, other in zip(q, k, strict=True)]
    if isinstance(term, LowRank):
        return [LowRank(*pair) for pair in zip(*(_rows(x, segments) for x in term), strict=True)]
    matrix = term.dense()
    several = matrix.shape[0] > 1
    parts = [(row if several else torch.zeros_like(row), at) for row, at in segments.places()]
    # (G, L, L, H): one matrix for each segment.
    return [Dense(matrix[row[..., None], :, at[:, :, None], at[:, None, :]].permute(0, 3, 1, 2)) for row, at in parts]


def _places(at: Positions, segments: Segments) -> list[Positions]:
    """Where the tokens of each kind of segments are, made once for all blocks.

    Leading tokens of a row are as many of each segment, in the order of these.
    """

    def made() -> list[Positions]:
        (own, n), found = (at.coords.shape[0], segments.numbers.shape[1]), list[Positions]()
        prefix, rest = divmod(at.prefix, sum(group.size for group in segments.groups))
        if rest or (own > 1 and at.prefix):
            raise ValueError(f"a row has as many leading tokens of each segment, got {at.prefix} in all")
        row = at if own == 1 else Positions(at.coords.flatten(0, 1)[None], at.extent, 0, at.on_grid, at.spacing)
        for flat in segments.split(torch.arange(segments.numbers.numel(), device=at.coords.device)):
            index = (flat if own > 1 else flat % n)[:, prefix:] - at.prefix
            found.append(row.take(index).with_prefix(prefix))
        return found

    return at.memoize(("segments", segments.groups, segments.numbers, segments.order), made)
