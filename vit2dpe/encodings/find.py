"""The encodings inside a model, and what of a model is theirs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .base import PositionEncoding, Sum


def named_encodings(model: nn.Module) -> dict[str, PositionEncoding]:
    """Every encoding inside a model by its dotted name, shared and per block; a sum beside its terms."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PositionEncoding)}


def encodings_of(model: nn.Module) -> list[PositionEncoding]:
    """Every encoding of a model that does something, shared and per block, sums taken apart."""
    return [e for e in named_encodings(model).values() if e.gives and not isinstance(e, Sum)]


def encoding_parameters(model: nn.Module) -> set[str]:
    """Full names of the tables, networks and frequencies that the encodings of a model learn."""
    encodings = named_encodings(model).items()
    return {f"{owner}.{name}" for owner, encoding in encodings for name, _ in encoding.named_parameters()}


def modules_outside_encodings(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without what is inside an encoding: initialisation leaves to encodings what they draw."""
    inside = tuple(f"{name}." for name in named_encodings(model))
    return ((name, module) for name, module in model.named_modules() if not name.startswith(inside))
