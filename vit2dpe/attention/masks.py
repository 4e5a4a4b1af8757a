"""Which keys a query may attend to, from where they are: boolean, True may attend, (B|1, 1, Nq, Nk).

Masks are combined with `&`, before attention, once. Prefix tokens have no place: they attend to all keys, and all
queries attend to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions, offsets
from ..signal import Dense, Signal


class FullMask(NamedTuple):
    """A boolean mask under which every query may attend to at least one key; `attend` need not check."""

    mask: Tensor


class Causal(NamedTuple):
    """A token attends to itself and to those before it, in their order: torch's `is_causal`, no matrix and no padding.

    Args:
        at: where the N tokens are, leading ones included, which are queries and keys.
    """

    at: Positions

    def tokens(self) -> int:
        """N. No property: torch before 2.11 compiles none of a named tuple."""
        return self.at.prefix + self.at.coords.shape[1]

    def matrix(self) -> Tensor:
        """(1, 1, N, N), True may attend: for a kernel that takes it together with biases, once for all blocks."""
        return self.at.memoize("causal", self._matrix)

    def _matrix(self) -> Tensor:
        step = torch.arange(self.tokens(), device=self.at.coords.device)
        return (step[:, None] >= step)[None, None]


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


def same_tile(q: Positions, k: Positions, side: Sequence[int]) -> Tensor:
    """Keys in the query's own window, where the grid is cut into windows of so many places from its first one.

    Args:
        q, k: places on one grid, of any number of axes, spacing 1.
        side: of a window along each axis.
    """
    if len(side) != q.axes or min(side) < 1:
        raise ConfigError(f"windows need a side of at least 1 for each of {q.axes} axes, got {tuple(side)}")
    near = torch.ones((), dtype=torch.bool, device=q.coords.device)
    for axis, size in enumerate(side):
        q_tile, k_tile = (((at.coords[..., axis] + 0.5) / size).floor() for at in (q, k))
        near = near & (q_tile[..., :, None] == k_tile[..., None, :])
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


def as_torch_takes_it(mask: Tensor | None, is_causal: bool, tokens: Tensor, heads: int) -> tuple[Tensor | None, Signal]:
    """The `attn_mask` and `is_causal` of torch's fused attention, which timm passes on, for self-attention.

    Args:
        mask: (N, N) or (B|1, H|1, N|1, N); boolean, True may attend, or numbers that are added to the logits (before a
            temperature of lengths), -inf where a query may not.
        is_causal: a token attends to itself and those before it, in their order; together with a mask, where both
            allow it.
        tokens: x (B, N, D), leading tokens included.
        heads: H.

    Returns:
        Where a query may attend, boolean or None, and a Signal with what is added.

    Raises:
        ValueError: for a mask of another shape or kind.
    """
    batch, count = tokens.shape[0], tokens.shape[1]
    allowed, added = None, Signal()
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"attn_mask is a tensor, got {type(mask).__name__}; a token_filter is given by name")
        if mask.device != tokens.device:
            raise ValueError(f"attn_mask is on {mask.device}, and the tokens are on {tokens.device}: use mask.to(...)")
        _check_shape(mask, batch, count, heads)
        if mask.dtype == torch.bool:
            allowed = mask
        elif mask.is_floating_point():
            allowed = ~mask.isneginf()
            number = mask.to(torch.promote_types(mask.dtype, torch.float32)).masked_fill(~allowed, 0.0)
            added = Signal(bias=(Dense(number.reshape((1,) * (4 - mask.ndim) + mask.shape)),))
        else:
            raise ValueError(
                f"attn_mask is boolean, True where a query may attend, or floats that are added to the logits; got "
                f"{mask.dtype}: use mask.bool()"
            )
    if is_causal:
        allowed = both(allowed, torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril())
    return allowed, added


def _check_shape(mask: Tensor, batch: int, count: int, heads: int) -> None:
    allowed = [(batch, 1), (heads, 1), (count, 1), (count,)]
    if mask.ndim == 2 and mask.shape == (count, count):
        return
    if mask.ndim == 4 and all(side in sides for side, sides in zip(mask.shape, allowed, strict=True)):
        return
    hints = {2: "; a mask of keys (B, N) is mask[:, None, None, :]", 3: "; a mask for each sample is mask[:, None]"}
    raise ValueError(
        f"attn_mask must be (N, N) or (B|1, H|1, N|1, N) with B = {batch} samples, H = {heads} heads and N = {count} "
        f"tokens, leading ones included; got {tuple(mask.shape)}{hints.get(mask.ndim, '')}"
    )


def together(at: Positions) -> Tensor | None:
    """Of places that do not all hold a token, or of images in a row: keys that hold one, of the query's own image.

    Queries that are padding attend to tokens too: where each sample or image has one, a `FullMask` can be made of it.

    Returns:
        (B|1, 1, 1|N, N), prefix tokens included, or None where every query may attend to every key.
    """
    held, segments = at.held(), at.segments()
    return both(None if held is None else present(held), None if segments is None else same(segments, segments))


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
