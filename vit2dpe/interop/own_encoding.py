"""A word that names the encoding a foreign model has already: its weights and options stay, but for what is named."""

from __future__ import annotations

import re
from collections import ChainMap

from torch import nn

from ..encodings import Sum, named_encodings
from ..encodings.registry import parse_blocks
from ..models.mae_names import State
from ..spec import Term


def with_own_options(position: str, own: str) -> str:
    """`position` with the options of the terms of `own` that it names, where it does not say otherwise."""
    theirs, words = [dict(word) for word in parse_blocks(own)], list[str]()
    for i, word in enumerate(parse_blocks(position)):
        options = dict(ChainMap(theirs[i % len(theirs)], *theirs))  # of the same word by block first
        words.append("+".join(str(Term(name, {**options.get(name, {}), **given})) for name, given in word))
    return "/".join(words)


def names_of(spec: str) -> list[list[str]]:
    """The names of a sum, without options; of words by block those of each."""
    return [[name for name, _ in word] for word in parse_blocks(spec)]


def own_weights(own: nn.Module, new: nn.Module, state: State) -> State:
    """Of the encodings of `new` that `own` has too, the weights in `state`, under the names they get.

    An option that gives a parameter another shape, or takes it away, leaves that parameter as it is drawn.

    Args:
        own, new: the model with its own encodings and with the named ones; the meta device will do.
        state: the weights, by the names of `own`.
    """
    sources = {(_place(owner), type(part)): (owner, part) for owner, part in named_encodings(own).items()}
    found: State = {}
    for owner, part in named_encodings(new).items():
        source = sources.get((_place(owner), type(part))) or sources.get(("position", type(part)))  # now of each block
        if source is None or isinstance(part, Sum):
            continue
        stored = {name: f"{source[0]}.{name}" for name, _ in source[1].named_parameters()}
        for name, value in part.named_parameters():
            if stored.get(name) in state and state[stored[name]].shape == value.shape:
                found[f"{owner}.{name}"] = state[stored[name]]
    return found


def carried(own: nn.Module, new: nn.Module, state: State) -> tuple[State, list[str]]:
    """What of a trained model goes into the same model with another encoding: all but the weights of its encodings, of
    which `own_weights` go; and the names of those that do not.

    Args:
        own, new: see `own_weights`.
        state: the weights, by the names of `own`.
    """
    inside = tuple(f"{owner}." for owner in named_encodings(own))
    kept = {name: value for name, value in state.items() if not name.startswith(inside)}
    terms = own_weights(own, new, state)
    taken = {id(value) for value in terms.values()}
    unused = sorted(name for name in state if name not in kept and id(state[name]) not in taken)
    return kept | terms, unused


def _place(owner: str) -> str:
    """The name of an encoding, or of the sum that it is a term of."""
    return re.sub(r"\.terms\.\d+$", "", owner)
