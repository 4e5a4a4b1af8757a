"""Which tokens of a packed row belong together, as data: numbers of segments, no matrix of pairs.

A packed row holds samples of different lengths one behind the other, without padding; each is a segment, and attends to
itself alone. Attention handles segments of one kind together, as an ordinary batch, so that no N x N of a row is made
(docs/decisions/0026). How many there are of which length is known where a row is made, and kept on the host: no forward
waits for a device to read it.

Legend: B rows, N tokens of a row, G segments of a kind, L tokens of each.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .errors import ConfigError


class Group(NamedTuple):
    """Segments of one kind: how many, and how long each of them is."""

    size: int
    length: int


class Segments(NamedTuple):
    """The segments of packed rows; made by `of`, or read from their numbers by `read`. A mask for `vit2dpe.attend`.

    Args:
        numbers: (B|1, N) int64, that of the segment in its row to which a token belongs; -1: none (padding).
        groups: the kinds of segments of all rows, in the order in which each occurs first.
        order: (B N,) tokens of all rows, one row behind the other, kind by kind and segment by segment, those of no
            segment last; None where that is the order in which they lie.
        back: its inverse.
        starts: (S + 1,) int32, where segments begin in that order, and where the last one ends.
        causal: whether a token attends to itself and those before it alone.
        inside: where tokens may attend inside of the segments of each kind, boolean (1|G, 1|H, L, L) or None; or ():
            everywhere.
    """

    numbers: Tensor
    groups: tuple[Group, ...]
    order: Tensor | None
    back: Tensor | None
    starts: Tensor
    causal: bool = False
    inside: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | Sequence[Sequence[int]],
        kinds: Sequence[Hashable] | None = None,
        *,
        prefix: int = 0,
        total: int | None = None,
        device: torch.device | str | None = None,
    ) -> Segments:
        """Segments of these lengths one behind the other, in one row, or in several: a list of lengths for each.

        Args:
            kinds: of each segment, rows one behind the other, where a length does not make two alike (shapes of
                images). Default: the length.
            prefix: of each segment so many tokens more lead the row, as those of `Positions.packed` do.
            total: N; what is behind the last segment of a row is padding. Default: the longest row.

        Raises:
            ConfigError: without a segment, for an empty one, what is no number, and a row longer than `total`.
        """
        several = [row for row in lengths if isinstance(row, Iterable) and getattr(row, "ndim", True)]
        try:
            each = cast("Sequence[Iterable[int]]", several if len(several) == len(lengths) else [lengths])
            rows = [[operator.index(x) for x in row] for row in each]
        except TypeError:
            raise ConfigError(f"lengths are whole numbers, or a list of these for each row: got {lengths}") from None
        if not rows or not all(rows) or min(x + prefix for row in rows for x in row) < 1:
            raise ConfigError(f"a row has at least one segment, and this at least one token: got lengths {lengths}")
        longest = max(sum(row) + prefix * len(row) for row in rows)
        n = longest if total is None else total
        if n < longest:
            raise ConfigError(f"the segments of a row have {longest} tokens, and the row {n}")
        index = torch.full((len(rows), n), -1, device="cpu")
        for line, row in zip(index, rows, strict=True):
            number = torch.arange(len(row), device="cpu")
            own = number.repeat_interleave(torch.tensor(row, device="cpu"))
            line[: sum(row) + prefix * len(row)] = torch.cat([number.repeat_interleave(prefix), own])
        return cls._made(index, kinds, device)

    @classmethod
    def read(cls, index: Tensor, kinds: Sequence[Hashable] | None = None) -> Segments:
        """From numbers (B|1, N), equal within a segment; below 0: padding. The host waits for those of a device."""
        if index.ndim != 2 or index.is_complex():
            raise ConfigError(f"segments are numbered in a tensor (B|1, N), got {index.dtype} {tuple(index.shape)}")
        return cls._made(index.detach().to("cpu", torch.int64), kinds, index.device)

    @classmethod
    def _made(cls, index: Tensor, kinds: Sequence[Hashable] | None, device: torch.device | str | None) -> Segments:
        index = index.clamp(min=-1)
        rows, n = index.shape
        row = torch.arange(rows, device="cpu")[:, None]
        flat = torch.where(index < 0, -1, index + row * (int(index.max()) + 1 if n and rows else 0)).flatten()
        numbers, which, counts = flat.unique(return_inverse=True, return_counts=True)
        first = torch.full_like(numbers, flat.numel()).scatter_reduce(0, which, torch.arange(flat.numel()), "amin")
        found = [i for i in first.argsort().tolist() if numbers[i] >= 0]  # segments, as each occurs first
        lengths = [int(counts[i]) for i in found]
        if kinds is not None and len(kinds) != len(lengths):
            raise ConfigError(f"each segment has one kind: got {len(kinds)} kinds of {len(lengths)} segments")
        members: dict[Hashable, list[int]] = {}
        for i, kind in enumerate(lengths if kinds is None else zip(lengths, kinds, strict=True)):
            members.setdefault(kind, []).append(i)
        sorted_ = [i for of_kind in members.values() for i in of_kind]
        rank = torch.full_like(numbers, len(found))  # of padding, which is last
        rank[torch.tensor([found[i] for i in sorted_], dtype=torch.int64)] = torch.arange(len(found))
        order = rank[which].argsort(stable=True)
        lies = bool((order[1:] > order[:-1]).all())
        starts = torch.tensor([0, *[lengths[i] for i in sorted_]]).cumsum(0).int()
        groups = tuple([Group(len(of_kind), lengths[of_kind[0]]) for of_kind in members.values()])
        made = cls(index, groups, None if lies else order, None if lies else order.argsort(), starts)
        return made if device is None else made.to(device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same with its tensors on another device."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        order, back = (None if x is None else moved(x) for x in (self.order, self.back))
        inside = tuple([None if x is None else moved(x) for x in self.inside])
        return Segments(moved(self.numbers), self.groups, order, back, moved(self.starts), self.causal, inside)

    def under(self, causal: bool = False, inside: Sequence[Tensor | None] = ()) -> Segments:
        """With these masks inside of segments; see `causal` and `inside`.

        Raises:
            ConfigError: for masks of another number than there are kinds.
        """
        if inside and len(inside) != len(self.groups):
            raise ConfigError(f"each kind of segments has one mask: got {len(inside)} for {len(self.groups)} kinds")
        return self._replace(causal=causal, inside=tuple(inside))

    def of_rows(self, batch: int) -> Segments:
        """The segments of `batch` rows: the same in each, where these are of one.

        Raises:
            ValueError: for those of other rows.
        """
        own, n = self.numbers.shape
        if own == batch:
            return self
        if own != 1:
            raise ValueError(f"these segments are of {own} rows, got {batch}")
        row = torch.arange(batch, device=self.numbers.device)[:, None] * n
        flat = torch.arange(n, device=self.numbers.device) if self.order is None else self.order
        order = torch.cat([(row + part).flatten() for part in flat.split(self.sizes())])
        each = [self.starts.new_full((batch * size,), length) for size, length in self.groups]
        starts = torch.cat([self.starts[:1], *each]).cumsum(0).to(self.starts)
        return Segments(
            self.numbers.expand(batch, -1),
            tuple([Group(batch * size, length) for size, length in self.groups]),
            order,
            order.argsort(),
            starts,
            self.causal,
            tuple([x if x is None or x.shape[0] == 1 else x.repeat(batch, 1, 1, 1) for x in self.inside]),
        )

    def sizes(self) -> list[int]:
        """How many tokens of all rows the segments of each kind have, and at last how many belong to none."""
        found = [size * length for size, length in self.groups]
        return [*found, self.numbers.numel() - sum(found)]

    def split(self, tokens: Tensor) -> Iterator[Tensor]:
        """(B N, ...) -> (G, L, ...) of each kind: views, where they lie in this order.

        Others are copied: where gradients are on all at once, so that there is one gradient of them and not one of each
        kind; else one kind at a time.
        """
        order = self.order
        if order is None or torch.is_grad_enabled():
            tokens = tokens if order is None else tokens.index_select(0, order)
            parts: Iterable[Tensor] = tokens.split(self.sizes())
        else:
            parts = (tokens.index_select(0, part) for part in order.split(self.sizes()))
        for part, group in zip(parts, self.groups, strict=False):
            yield part.unflatten(0, group)

    def join(self, parts: Iterable[Tensor], like: Tensor) -> Tensor:
        """(G, L, ...) of each kind -> (B N, ...), zeros for padding; `like` (any, ...), for rows of padding alone."""
        if not torch.is_grad_enabled() and self.order is not None:
            return self._written(parts, like)
        flat, padding = [part.flatten(0, 1) for part in parts], self.sizes()[-1]
        if padding or not flat:
            flat.append((flat or [like])[0].new_zeros(padding, *like.shape[1:]))
        tokens = flat[0] if len(flat) == 1 else torch.cat(flat)
        return tokens if self.back is None else tokens.index_select(0, self.back)

    def _written(self, parts: Iterable[Tensor], like: Tensor) -> Tensor:
        """The same, where nobody differentiates: each kind is let go as soon as it has its place."""
        row = None
        order = iter(() if self.order is None else self.order.split(self.sizes()))
        for part in parts:
            row = part.new_zeros(self.numbers.numel(), *part.shape[2:]) if row is None else row
            row.index_copy_(0, next(order), part.flatten(0, 1))
        return like.new_zeros(self.numbers.numel(), *like.shape[1:]) if row is None else row

    def places(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each kind the rows (G, 1) of its segments, and where in the row their tokens are, (G, L)."""
        n = self.numbers.shape[1]
        for flat in self.split(torch.arange(self.numbers.numel(), device=self.numbers.device)):
            yield flat[:, :1] // n, flat % n

    def matrix(self) -> Tensor:
        """(B|1, 1|H, N, N), True may attend: where a matrix has to be. Padding attends to nothing."""
        found = (self.numbers[:, :, None] == self.numbers[:, None, :]) & (self.numbers >= 0)[:, :, None]
        if self.causal:
            step = torch.arange(self.numbers.shape[1], device=self.numbers.device)
            found = found & (step[:, None] >= step)
        found = found[:, None]
        for mask, (row, at) in zip(self.inside, self.places(), strict=False):
            if mask is not None:
                found = found.expand(-1, max(mask.shape[1], found.shape[1]), -1, -1).clone()
                here = (row[..., None], slice(None), at[:, :, None], at[:, None, :])  # (G, L, L, H)
                found[here] &= mask.permute(0, 2, 3, 1)
        return found


def nested(instead: str) -> ConfigError:
    """For a nested tensor of torch's, and what to give instead of it."""
    return ConfigError(f"nested tensors are not taken: {instead}")
