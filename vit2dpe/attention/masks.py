"""Which keys a query may attend to, from where they are: boolean, True may attend, (B|1, 1, Nq, Nk).

Masks are combined with `&`, before attention, once. Prefix tokens have no place: they attend to all keys, and all
queries attend to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions, offsets


def causal(q: Positions, k: Positions) -> Tensor:
    """Keys at the query's place or before it, on a line.

    Raises:
        ConfigError: beyond one axis, where "before" has no meaning of its own.
    """
    if q.axes != 1 or k.axes != 1:
        raise ConfigError(f"a causal mask needs places on a line, got {q.axes} and {k.axes} axes")
    return _with_prefix(q.coords[..., 0, None] >= k.coords[..., None, :, 0], q, k)


def window(q: Positions, k: Positions, reach: int | Sequence[int]) -> Tensor:
    """Keys at most `reach` places away along every axis: a sliding window of side 2 reach + 1.

    Args:
        q, k: places on one grid, of any number of axes.
        reach: the same for all axes, or one for each.
    """
    each = [reach] * q.axes if isinstance(reach, int) else list(reach)
    if len(each) != q.axes or min(each) < 0:
        raise ConfigError(f"a window needs a reach of at least 0 for each of {q.axes} axes, got {reach}")
    near = offsets(q, k, 0).abs() <= each[0]
    for axis in range(1, q.axes):
        near = near & (offsets(q, k, axis).abs() <= each[axis])
    return _with_prefix(near, q, k)


def present(valid: Tensor) -> Tensor:
    """(B, Nk) True for tokens, False for padding -> (B, 1, 1, Nk)."""
    if valid.dtype != torch.bool or valid.ndim != 2:
        raise ValueError(
            f"`valid` must be boolean (B, N), True for tokens and False for padding; got {valid.dtype} "
            f"{tuple(valid.shape)}"
        )
    return valid[:, None, None, :]


def same(q: Tensor, k: Tensor) -> Tensor:
    """Keys of the query's own document: (B|1, Nq) and (B|1, Nk) document numbers -> (B|1, 1, Nq, Nk)."""
    return (q[:, :, None] == k[:, None, :])[:, None]


def both(*masks: Tensor | None) -> Tensor | None:
    """What all of them allow; None allows everything."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    allowed = given[0]
    for mask in given[1:]:
        allowed = allowed & mask
    return allowed


def _with_prefix(mask: Tensor, q: Positions, k: Positions) -> Tensor:
    return F.pad(mask.to(q.coords.device), (k.prefix, 0, q.prefix, 0), value=True)[:, None]
