"""Signals of packed rows: an encoding is evaluated at the places of each kind of segments, as for an ordinary batch.

So a sample in a row is what it is alone, whatever the encoding, the policy and the size of the grid; tokens and
rotations are laid out in the row, a bias stays apart by kind, and N x N of a row is never made (docs/decisions/0026).

Legend: B rows, N tokens of a row, G segments of a kind, L tokens of each, prefix included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .contextual import Contextual
from .errors import ConfigError
from .positions import Positions, Row
from .segments import Segments
from .signal import Bias, Rotation, Signal


def in_segments(at: Positions, segments: Segments, places: Sequence[Positions]) -> Positions:
    """The places of a packed row, of which it is known that each kind of its segments stands at such places.

    Args:
        at: of the row.
        places: of each kind of segments, leading tokens included, (1|G, L).

    Raises:
        ConfigError: for places of other numbers of tokens.
    """
    tokens = [place.prefix + place.coords.shape[1] for place in places]
    if tokens != [group.length for group in segments.groups]:
        raise ConfigError(f"segments of {[group.length for group in segments.groups]} tokens, and places of {tokens}")
    return replace(at, row=Row(segments, tuple(places)))


def packed_grids(
    extents: Sequence[Sequence[int]],
    prefix: int = 0,
    length: int | None = None,
    device: torch.device | str | None = None,
) -> Positions:
    """Images of any sizes in one row, as `Positions.packed`, with what `attend` takes: `row.segments`.

    Args:
        extents: of each image how many places there are along each axis.
        prefix: leading tokens of each image; those of all lead the row.
        length: how many places the row has, padding among them.
    """
    shapes = [tuple(extent) for extent in extents]
    at = Positions.packed(shapes, length, device).with_prefix(prefix * len(shapes))
    counts, total = [math.prod(shape) for shape in shapes], at.prefix + at.coords.shape[1]
    segments = Segments.of(counts, shapes, prefix=prefix, total=total, device=device)
    places = [Positions.grid(shape, device).with_prefix(prefix) for shape in dict.fromkeys(shapes)]
    return in_segments(at, segments, places)


class Grouped(NamedTuple):
    """A bias of a packed row: of each kind of segments a Signal of which biases and temperature count."""

    signals: tuple[Signal, ...]
    segments: Segments

    def dense(self) -> Tensor:
        raise ConfigError("a bias of a packed row is apart by segments: only `attend` under the same Segments takes it")


def flat(terms: Iterable[Bias]) -> Iterator[Bias]:
    """The terms, those of each kind of segments in place of a `Grouped` one."""
    for term in terms:
        if isinstance(term, Grouped):
            for signal in term.signals:
                yield from signal.bias
        else:
            yield term


def contextual(signal: Signal) -> bool:
    """Whether a term has to be contracted with queries or keys as they are projected."""
    return any(isinstance(term, Contextual) for term in flat(signal.bias))


def joined(segments: Segments, signals: Sequence[Signal]) -> Signal:
    """The Signal of a row from those of each kind of its segments."""
    turns = _rotations(segments, [signal.q_rotation for signal in signals])
    same = all(signal.k_rotation is signal.q_rotation for signal in signals)
    temperatures, bias = [signal.temperature for signal in signals], tuple[Bias, ...]()
    one = not any(isinstance(t, Tensor) for t in temperatures) and len(set(temperatures)) == 1
    if not one or any(signal.bias for signal in signals):
        kept = tuple([Signal(bias=s.bias, temperature=None if one else s.temperature) for s in signals])
        bias = (Grouped(kept, segments),)
    return Signal(
        token=_tokens(segments, [signal.token for signal in signals]),
        q_rotation=turns,
        k_rotation=turns if same else _rotations(segments, [signal.k_rotation for signal in signals]),
        bias=bias,
        temperature=temperatures[0] if one else None,
        blocks=tuple([joined(segments, part) for part in zip(*(signal.blocks for signal in signals), strict=True)]),
        order=signals[0].order,
    )


def _tokens(segments: Segments, tokens: Sequence[Tensor | None]) -> Tensor | None:
    """(1|G, L, D) of each kind -> (B, N, D)."""
    found = [token for token in tokens if token is not None]
    return _laid_out(segments, found) if found else None


def _rotations(segments: Segments, rotations: Sequence[Rotation | None]) -> Rotation | None:
    """(1|G, 1|H, L, Dh/2) of each kind -> (B, 1|H, N, Dh/2), cosine and sine side by side."""
    found = [torch.stack(rotation, dim=-1).transpose(1, 2) for rotation in rotations if rotation is not None]
    if not found:
        return None
    cos, sin = _laid_out(segments, found).transpose(1, 2).unbind(-1)
    return Rotation(cos, sin)


def _laid_out(segments: Segments, parts: list[Tensor]) -> Tensor:
    """(1|G, L, ...) of each kind -> (B, N, ...)."""
    each = [part.expand(size, *part.shape[1:]) for part, (size, _) in zip(parts, segments.groups, strict=True)]
    row: Tensor = segments.join(each, parts[0][0]).unflatten(0, segments.numbers.shape)
    return row
