"""Weights by name, each taken once, so that what is left over is known; and what a config may not ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError

Config = dict[str, Any]
State = dict[str, Tensor]
Converted = tuple[type, Config, State]  # our model, its arguments, its weights


class Weights:
    """A state dict that remembers what was taken from it."""

    def __init__(self, state: State) -> None:
        self.left = dict(state)

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise CheckpointError(f"the checkpoint has no {name}")
        return self.left.pop(name).detach().clone()

    def linear(self, ours: str, theirs: str, bias: bool = True) -> State:
        parts = ("weight", "bias") if bias else ("weight",)
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}") for part in parts}

    def linears(self, ours: str, theirs: str, names: dict[str, str], bias: bool = True) -> State:
        """Several maps, each under its own name: `names` is ours -> theirs, behind the prefixes."""
        found: State = {}
        for mine, other in names.items():
            found |= self.linear(ours + mine, theirs + other, bias)
        return found

    def joined(self, ours: str, theirs: list[str], bias: bool = True) -> State:
        """Several maps of one input as one: rows below rows."""
        parts = ("weight", "bias") if bias else ("weight",)
        return {f"{ours}.{part}": torch.cat([self.take(f"{name}.{part}") for name in theirs]) for part in parts}

    def without(self, *prefixes: str) -> Weights:
        """Names without the first of these prefixes that they have."""
        for prefix in prefixes:
            self.left = {name.removeprefix(prefix): value for name, value in self.left.items()}
        return self

    def drop(self, *names: str) -> None:
        """What ours does not need."""
        self.left = {n: v for n, v in self.left.items() if not n.startswith(names) and not n.endswith(names)}

    def head(self, name: str, embedding: Tensor) -> Tensor | None:
        """The matrix of the head, or None where there is none or it is the embedding's."""
        found = self.left.pop(name, None)
        return None if found is None or torch.equal(found, embedding) else found

    def finish(self) -> None:
        if self.left:
            raise CheckpointError(f"weights that ours has no place for: {', '.join(list(self.left)[:5])}")


def with_head(state: State, head: Tensor | None, prefix: str = "") -> State:
    """With the matrix of a head that is not the embedding's."""
    return state if head is None else state | {f"{prefix}head.weight": head}


def demand(config: Config, **wanted: Any) -> None:
    """Refuse what our model would compute differently."""
    for name, value in wanted.items():
        if config.get(name, value) != value and config[name] is not None:
            raise ConfigError(f"a {config['model_type']} with {name}={config[name]!r} is not covered, only {value!r}")
