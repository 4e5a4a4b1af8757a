"""Weights by name, each taken once, so that leftovers are known; settings that ours does not cover are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...models.mae_names import State
from ...models.spec import Arguments
from ...models.swin.model import Swin
from ...models.text.heads import TextDecoder, TextEncoder
from ...models.text.seq2seq import Seq2Seq
from ...models.vit import ViT

Config = Arguments  # of a model of transformers, as its config.json holds it


OurModel = TextEncoder | TextDecoder | Seq2Seq | ViT | Swin


class Converted(NamedTuple):
    """One of our models, the arguments it is built with, its weights, and its own policy beyond its context."""

    model: type[OurModel]
    arguments: Arguments
    state: State
    policy: str | None = None


class Weights:
    """A state dict of which each weight is taken once; `finish` refuses leftovers."""

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
        state: State = {}
        for to, source in names.items():
            state |= self.linear(ours + to, theirs + source, bias)
        return state

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
        """Leave out what ours does not need: names that start or end with one of these."""
        self.left = {n: v for n, v in self.left.items() if not n.startswith(names) and not n.endswith(names)}

    def head(self, name: str, embedding: Tensor) -> Tensor | None:
        """The matrix of the head, or None where there is none or it is the embedding's."""
        matrix = self.left.pop(name, None)
        return None if matrix is None or torch.equal(matrix, embedding) else matrix

    def finish(self) -> None:
        if self.left:
            raise CheckpointError(f"weights that ours has no place for: {', '.join(list(self.left)[:5])}")


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """A name of theirs in our spelling, by the first pattern that fits it whole; None where none does.

    Args:
        names: patterns of theirs, without the ending .weight or .bias -> ours.
    """
    ending = next((end for end in (".weight", ".bias") if name.endswith(end)), "")
    for theirs, ours in names.items():
        if found := re.fullmatch(theirs, name.removesuffix(ending)):
            return found.expand(ours) + ending
    return None


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k, head by head: (i, i + Dh/2) of each head to (2i, 2i+1)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def with_head(state: State, head: Tensor | None, prefix: str = "") -> State:
    """With the matrix of a head that is not the embedding's."""
    return state if head is None else state | {f"{prefix}head.weight": head}


def demand(config: Config, **wanted: str | bool | float) -> None:
    """Refuse settings under which our model would compute something else."""
    for name, value in wanted.items():
        if config.get(name, value) != value and config[name] is not None:
            raise ConfigError(f"a {config['model_type']} with {name}={config[name]!r} is not covered, only {value!r}")
