"""A choice between paths that compute the same, with its reason; and what rules every special path out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The path that is taken, and why."""

    path: str
    why: str


def plain_only(x: Tensor) -> str | None:
    """Why nothing but plain operations may run on x; None where autograd functions of our own may."""
    if torch.compiler.is_compiling():
        return "compiling or exporting"
    if torch.jit.is_tracing():
        return "tracing"
    if type(x) is not Tensor:
        return f"a tensor of another kind, {type(x).__name__}"
    if torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0:
        return "function transforms"
    return None
