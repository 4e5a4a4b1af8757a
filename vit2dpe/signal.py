"""What attention should do about where tokens are: tensors, and how they add up.

Legend: B batch, H heads, N tokens (prefix included), D width, Dh head width. A leading 1 stands for "all".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .positions import Positions, distance, is_tracing, offsets

T = TypeVar("T")


class Rotation(NamedTuple):
    """Cosine and sine of one angle for each pair of channels (2i, 2i+1): both (B|1, 1|H, N, Dh/2), float32.

    Those of an encoding lie side by side in memory (`encodings.base.interleave`), where a kernel reads cos + i sin
    without a copy; any two tensors serve.
    """

    cos: Tensor
    sin: Tensor

    def times(self, other: Rotation) -> Rotation:
        """One rotation after the other: the product of cos + i sin."""
        return Rotation(
            self.cos * other.cos - self.sin * other.sin,
            self.sin * other.cos + self.cos * other.sin,
        )


class Bias(Protocol):
    """A term added to the logits; `.dense()` is the reference for every faster path."""

    def dense(self) -> Tensor:
        """(B|1, H, Nq, Nk)"""
        ...


class Dense(NamedTuple):
    """A bias given in full, (B|1, H, Nq, Nk), and, where it was looked up for several blocks, why."""

    tensor: Tensor
    why: str = ""

    def dense(self) -> Tensor:
        return self.tensor


class Table(NamedTuple):
    """A bias looked up by offset: entry [h, Δ + size - 1] of `table` for Δ = q - k, zero for the prefix.

    Args:
        table: (H, 2 S_1 - 1, ..., 2 S_d - 1) for a grid of sizes S, head-major.
        q, k: places of queries and keys, whole coordinates.
        prefix: (H, 3), what pairs with prefix tokens get instead of zero: a prefix token asking a patch, a patch
            asking a prefix token, a prefix token asking one.
    """

    table: Tensor
    q: Positions
    k: Positions
    prefix: Tensor | None = None

    def dense(self) -> Tensor:
        index = self.q.memoize(("offsets", None if self.k is self.q else self.k, self.table.shape[1:]), self._index)
        flat = self.table.flatten(1)
        if self._columns():
            front = flat.new_zeros(flat.shape[0], self._columns()) if self.prefix is None else self.prefix
            flat = torch.cat([front, flat], dim=1)
        dense: Tensor = flat.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(0, 1)
        return dense  # (B|1, H, Nq, Nk)

    def _columns(self) -> int:
        """How many columns stand in front of the flat table, for pairs with the prefix.

        No property: torch before 2.11 compiles none of a named tuple."""
        return 3 if self.q.prefix or self.k.prefix else 0

    def linear(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """(B|1, N) of queries and (B|1, N) of keys that have a place, int64: the entry of q - k in the flat table is a
        difference of the two, plus `start`."""
        sizes = self.table.shape[1:]
        q = self.q.places()  # (B|1, N, d)
        k = q if self.k is self.q else self.k.places()
        self._check()
        # Row-major index of q - k + S - 1, linear in q and in k: one subtraction for all pairs.
        later = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
        middle = sum((size - 1) // 2 * step for size, step in zip(sizes, later, strict=True))
        k_index = _inner(k, later)
        return (k_index if k is q else _inner(q, later)) + (start + middle), k_index

    def _index(self) -> Tensor:
        """(B|1, Nq, Nk) entry of the flat table behind its columns for the prefix."""
        q_index, k_index = self.linear(self._columns())
        index = q_index[..., :, None] - k_index[..., None, :]
        if not self._columns():
            return index
        above = F.pad(index.new_zeros(index.shape[0], 1, index.shape[2]), (self.k.prefix, 0), value=2).expand(
            -1, self.q.prefix, -1
        )
        return torch.cat([above, F.pad(index, (self.k.prefix, 0), value=1)], dim=1)

    def _check(self) -> None:
        """Refuse offsets that the table does not have. Places that are known to be on its grid are not looked at."""
        if torch.compiler.is_compiling() or is_tracing():  # a graph for all sizes is not narrowed
            return
        reach = [(size - 1) // 2 for size in self.table.shape[1:]]
        if all(_within(at, reach) for at in (self.q, self.k)):
            return
        q, k = self.q.bounds(), self.k.bounds()
        if q is None or k is None:
            return
        for axis, most in enumerate(reach):
            low, high = round(q.least[axis] - k.most[axis]), round(q.most[axis] - k.least[axis])
            if low < -most or high > most:
                raise ValueError(f"offsets along axis {axis} leave the table: it covers ±{most}, got {low} to {high}")


def _within(at: Positions, reach: list[int]) -> bool:
    """Whether the places are known to be on a grid of which a table covers all offsets."""
    sizes = at.largest
    return at.on_grid and bool(sizes) and all(size - 1 <= most for size, most in zip(sizes, reach, strict=True))


def _inner(places: Tensor, steps: list[int]) -> Tensor:
    """(B|1, N, d) -> (B|1, N): the sum over axes of place times step."""
    found = places[..., -1]  # whose step is 1
    for axis, step in enumerate(steps[:-1]):
        found = found + places[..., axis] * step
    return found


class LowRank(NamedTuple):
    """A bias that is a product: fq (B|1, H, Nq, r) times fk (B|1, H, Nk, r) transposed."""

    fq: Tensor
    fk: Tensor

    def dense(self) -> Tensor:
        device, fq, fk = self.fq.device.type, self.fq, self.fk
        if device == "cuda":  # where TF32 is allowed, squares of places would be rounded to 11 bits before they cancel
            fq, fk = fq.double(), fk.double()
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            return (fq @ fk.transpose(-1, -2)).to(self.fq.dtype)


_ORDERS = {"euclidean": 2.0, "manhattan": 1.0, "chebyshev": math.inf}
UNSEEN = -1e9  # a bias that no softmax tells from minus infinity, and under which a row that sees nothing is finite


class Distance(NamedTuple):
    """A penalty that grows with distance, -factor · slopes[h] · f(‖q - k‖), zero for the prefix; a formula, so that
    what computes logits can compute it there, and no matrix has to be.

    Args:
        q, k: places of queries and keys.
        slopes: H numbers; or what is learned, (H,), or (H, d) of each axis: the penalty is ‖slopes[h] (q - k)‖.
        directions: d numbers, a unit vector, for each of the first heads: these see the keys k with
            ⟨k - q, direction⟩ >= limit · ‖k - q‖ - 1e-4 alone, and for all others the bias is factor · `UNSEEN`.
        limit: the cosine of half the angle that they see.
        factor: of all heads; a 0-d tensor where one graph serves several blocks.
        dtype: of the matrix; distances are taken in float64.
        kind: of the distance, a word of `positions.DISTANCES`.
        bend: f, with slopes (H,): "" x, "log" ln(1 + rate[h] x), "power" x^rate[h].
        rate: (H,)
    """

    q: Positions
    k: Positions
    slopes: tuple[float, ...] | Tensor
    directions: tuple[tuple[float, ...], ...] = ()
    limit: float = -1.0
    factor: float | Tensor = 1.0
    dtype: torch.dtype = torch.float32
    kind: str = "euclidean"
    bend: str = ""
    rate: Tensor | None = None

    def dense(self) -> Tensor:
        if isinstance(self.slopes, Tensor):
            bias = self._behind_prefix(self._learned(self.slopes).to(self.dtype))
        else:
            fixed = (self.slopes, self.directions, self.limit, self.dtype, self.kind)
            key = ("distance", None if self.k is self.q else self.k, *fixed)
            bias = self.q.memoize(key, self._unscaled)  # the same for all blocks
        return bias if not isinstance(self.factor, Tensor) and self.factor == 1.0 else bias * self.factor

    def _unscaled(self) -> Tensor:
        """(B|1, H, Nq, Nk) with a factor of 1; a head at a time, to hold one float64 matrix and not H."""
        far, device = distance(self.q, self.k, self.kind), self.q.coords.device
        if self.directions:
            heads = self._directed(-far.to(device, self.dtype))
        else:
            heads = [(-slope * far).to(device, self.dtype) for slope in self.slopes]
        return self._behind_prefix(torch.stack(heads, dim=1))

    def _behind_prefix(self, bias: Tensor) -> Tensor:
        prefix = (self.k.prefix, 0, self.q.prefix, 0)
        return F.pad(bias, prefix) if any(prefix) else bias  # which would be a copy

    def _learned(self, slopes: Tensor) -> Tensor:
        """(B|1, H, Nq, Nk) in the dtype of the slopes; distances, in float64, are the same for all blocks."""
        key = ("far", None if self.k is self.q else self.k, slopes.dtype)
        if slopes.ndim == 1:
            far = self.q.memoize((*key, self.kind), lambda: distance(self.q, self.k, self.kind).to(slopes)[:, None])
            return -slopes[:, None, None] * self._bent(far)
        if slopes.shape[1] != self.q.axes:
            raise ValueError(f"these slopes are for {slopes.shape[1]} axes, the positions have {self.q.axes}")
        each = [offsets(self.q, self.k, axis).to(slopes)[:, None] for axis in range(self.q.axes)]
        scaled = torch.stack([step * slopes[:, axis, None, None] for axis, step in enumerate(each)], dim=-1)
        if self.kind == "squared":
            return -scaled.square().sum(-1)
        size: Tensor = torch.linalg.vector_norm(scaled, _ORDERS[self.kind], dim=-1)  # its gradient at 0 is 0
        return -size

    def _bent(self, far: Tensor) -> Tensor:
        if self.rate is None:
            return far
        rate = self.rate[:, None, None]
        return torch.log1p(far * rate) if self.bend == "log" else far.pow(rate)

    def _directed(self, near: Tensor) -> list[Tensor]:
        apart = [-offsets(self.q, self.k, axis).to(near.device, self.dtype) for axis in range(self.q.axes)]  # k - q
        edge = near * -self.limit - 1e-4  # keys on the edge of the view are in it
        heads = []
        for first, *rest in self.directions:
            ahead = apart[0] * first
            for along, step in zip(rest, apart[1:], strict=True):
                ahead = torch.add(ahead, step, alpha=along)
            heads.append(near.masked_fill(ahead < edge, UNSEEN))
        return heads + [near * slope for slope in self.slopes[len(heads) :]]


class Signal(NamedTuple):
    """Every effect that an encoding may have on attention. A field that is None (or empty) has none.

    Signals add: tokens sum, rotations multiply, bias terms concatenate, temperatures multiply. So
    encodings compose with `+`, and the empty Signal is the ablation.

    Args:
        token: (B|1, N, D), added to tokens.
        q_rotation, k_rotation: turn each pair of channels of queries and keys.
        bias: terms added to the logits.
        temperature: factor on q·k and on the bias, not on a mask; a 0-d tensor where a graph is traced for all sizes,
            (B|1, 1, N|1, 1) where samples, or the images that tokens of a row belong to, have sizes of their own.
        blocks, order: what blocks have beside that, where they follow different words (`encodings.cycle`): block i of
            a model has blocks[order[i mod len(order)]].
    """

    token: Tensor | None = None
    q_rotation: Rotation | None = None
    k_rotation: Rotation | None = None
    bias: tuple[Bias, ...] = ()
    temperature: float | Tensor | None = None
    blocks: tuple[Signal, ...] = ()
    order: tuple[int, ...] = ()

    def with_bias(self, bias: tuple[Bias, ...]) -> Signal:
        """With these terms instead of its own; `_replace` would do, but torch before 2.11 does not compile it."""
        return Signal(self.token, self.q_rotation, self.k_rotation, bias, self.temperature, self.blocks, self.order)

    def with_blocks(self, blocks: tuple[Signal, ...], order: tuple[int, ...]) -> Signal:
        """With these parts of blocks instead of its own."""
        return Signal(self.token, self.q_rotation, self.k_rotation, self.bias, self.temperature, blocks, order)

    def of_block(self, index: int) -> Signal:
        """The Signal of one block of a model."""
        if not self.blocks:
            return self
        return self.with_blocks((), ()).plus(self.blocks[self.order[index % len(self.order)]])

    def plus(self, other: Signal) -> Signal:
        if self.blocks and other.blocks:
            raise ValueError("of two Signals by block no sum is known: add the words of each block")
        return Signal(
            _both(self.token, other.token, lambda a, b: a + b),
            _both(self.q_rotation, other.q_rotation, Rotation.times),
            _both(self.k_rotation, other.k_rotation, Rotation.times),
            (*self.bias, *other.bias),
            _product(self.temperature, other.temperature),
            self.blocks or other.blocks,
            self.order or other.order,
        )

    def __add__(self, other: Signal) -> Signal:  # type: ignore[override]  # tuples would concatenate
        return self.plus(other)


def _product(a: float | Tensor | None, b: float | Tensor | None) -> float | Tensor | None:
    if a is None:
        return b
    return a if b is None else a * b


def _both(a: T | None, b: T | None, combine: Callable[[T, T], T]) -> T | None:
    if a is None:
        return b
    return a if b is None else combine(a, b)
