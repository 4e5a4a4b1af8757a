"""Contextual biases meet queries and keys: those of attention, or fixed ones with which they are looked at.

Legend: B batch, H heads, Nq, Nk tokens, Dh head width, d axes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contextual import Contextual
from ..errors import ConfigError
from ..positions import exact
from ..signal import Bias, Signal


def contract(signal: Signal, q: Tensor, k: Tensor | None) -> Signal:
    """The Signal with every contextual term contracted with q (B, H, Nq, Dh) or k (B, H, Nk, Dh), not rotated yet.

    Args:
        k: None: keys that are not rotated will come later, all of them; terms of keys are left.

    Raises:
        ConfigError: where keys are kept rotated, and a term wants them as they were.
    """
    if not any(isinstance(term, Contextual) for term in signal.bias):
        return signal
    terms: list[Bias] = []
    for term in signal.bias:
        if not isinstance(term, Contextual):
            terms.append(term)
        elif not term.of_keys:
            terms.append(term.contracted(q))
        elif k is not None:
            terms.append(term.contracted(k))
        elif signal.k_rotation is None:
            terms.append(term)
        else:
            raise ConfigError(
                "a cache keeps keys rotated, and a contextual bias of keys wants them as they were projected: beside a "
                "rotary encoding use one of queries alone, or no cache"
            )
    return signal.with_bias(tuple(terms))


def probed(signal: Signal) -> Signal:
    """The Signal with every contextual term contracted with queries and keys that are fixed functions of places."""
    if not any(isinstance(term, Contextual) for term in signal.bias):
        return signal
    with torch.autocast("cpu", enabled=False):
        terms = [term.contracted(_content(term)) if isinstance(term, Contextual) else term for term in signal.bias]
    return signal.with_bias(tuple(terms))


def _content(term: Contextual) -> Tensor:
    """(B, H, N, Dh) numbers in ±1 that hardly repeat, a function of places; those of prefix tokens are 1."""
    at, like = term.k if term.of_keys else term.q, term.vectors[0]
    coords = exact(at.coords)  # (B|1, N, d)
    channel = torch.arange(1, term.heads * like.shape[-1] + 1, device=coords.device, dtype=torch.float64)
    phase = channel.square() + (1.0 if term.of_keys else 0.0)
    for axis in range(at.axes):
        phase = phase + coords[..., axis, None] * (channel * (0.7 + axis))
    x = phase.cos().unflatten(-1, (term.heads, -1)).transpose(1, 2).to(like.device, like.dtype)
    batch = max(term.q.coords.shape[0], term.k.coords.shape[0])
    return F.pad(x.expand(batch, -1, -1, -1), (0, 0, at.prefix, 0), value=1.0)
