"""A fourth kind of bias: vectors that are a pure function of places, which attention contracts with queries or keys.

    logit(i, j) += scale · q_i · a[e(p_i - p_j)]        of queries; of keys: + scale · k_j · b[e(p_i - p_j)]

q and k are those that `attend` receives: projected, behind their norms, before rotation and before the scale of q·k. An
encoding gives the vectors and never sees q (docs/decisions/0020). No tensor of N x N x Dh is made: the products with
all E vectors come first, N x E, and are then looked up for each pair.

Sources: Shaw et al., arXiv 1803.02155; MViTv2, arXiv 2112.01526 (decomposed by axis; timm, `mvitv2.py`,
`cal_rel_pos_type`); iRPE, arXiv 2107.14222 (contextual product; `irpe.py`, `forward_rpe_transpose`); DeBERTa, arXiv
2006.03654 (of queries and of keys).

Legend: B batch, H heads, Nq, Nk tokens, Dh head width, E vectors of a table, S_a size of the grid along axis a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError
from .positions import Positions
from .signal import Table

# For each table the vectors that pairs read, entries and weights (B|1, Nq, Nk) to be added up, None for 1; or weights
# of all vectors (B|1, Nq, Nk, E).
Pairs = Sequence[Sequence[tuple[Tensor, Tensor | None]] | Tensor]
ReadPairs = Callable[[Positions, Positions], Pairs]


class Contextual(NamedTuple):
    """Vectors by offset, to be contracted with queries (or keys); zero for pairs with the prefix.

    Args:
        vectors: one table (1|H, E, Dh) for offsets along all axes, or one (1|H, E_a, Dh) for each axis, whose products
            are added up.
        entries: for each table which of its vectors an offset q - k has: int64 over all offsets of the extent, (2 S_1 -
            1, ..., 2 S_d - 1), or along an axis, (2 S_a - 1,).
        q, k: places of queries and keys, whole coordinates.
        heads: H.
        scale: of these products alone.
        of_keys: contracted with keys instead of queries.
        read: instead of entries, for grids of several sizes, what each pair reads, from places of queries and keys.
    """

    vectors: tuple[Tensor, ...]
    entries: tuple[Tensor, ...]
    q: Positions
    k: Positions
    heads: int
    scale: float = 1.0
    of_keys: bool = False
    read: ReadPairs | None = None

    def dense(self) -> Tensor:
        raise ConfigError(
            "a contextual bias has no numbers before attention contracts it with queries or keys: `attend` does, in "
            "stock.RotaryEncoderLayer too; a float mask cannot"
        )

    def contracted(self, x: Tensor) -> Products:
        """The products with queries (B, H, Nq, Dh), or with keys (B, H, Nk, Dh), in their dtype.

        Raises:
            ValueError: for another number of heads, tokens or channels.
        """
        at, width = self.k if self.of_keys else self.q, self.vectors[0].shape[-1]
        tokens = at.prefix + at.coords.shape[1]
        if x.shape[1] != self.heads or x.shape[2] != tokens or x.shape[3] != width:
            raise ValueError(
                f"this contextual bias is for {tokens} {'keys' if self.of_keys else 'queries'} in {self.heads} heads "
                f"of {width} channels, got {tuple(x.shape)}"
            )
        x = x[:, :, at.prefix :]
        tables = [(a if self.scale == 1.0 else a * self.scale).to(x.dtype) for a in self.vectors]
        products = [x @ a[0].t() if a.shape[0] == 1 else torch.einsum("bhnd,hed->bhne", x, a) for a in tables]
        return Products(tuple(products), self.entries, self.q, self.k, self.of_keys, self.read)


class Products(NamedTuple):
    """A `Contextual` term that is contracted: products (B, H, N, E) of queries, or of keys, with each table."""

    products: tuple[Tensor, ...]
    entries: tuple[Tensor, ...]
    q: Positions
    k: Positions
    of_keys: bool = False
    read: ReadPairs | None = None

    def dense(self) -> Tensor:
        """(B, H, Nq, Nk)"""
        found = self._of_offsets() if self.read is None else self._of_pairs(self.read(self.q, self.k))
        prefix = (self.k.prefix, 0, self.q.prefix, 0)
        return F.pad(found, prefix) if any(prefix) else found

    def _of_pairs(self, pairs: Pairs) -> Tensor:
        total: Tensor | None = None
        for products, read in zip(self.products, pairs, strict=True):
            x = products.to(torch.promote_types(products.dtype, torch.float32))
            if isinstance(read, Tensor):
                part = torch.einsum("bhje,bije->bhij" if self.of_keys else "bhie,bije->bhij", x, read.to(x))
                total = part if total is None else total + part
                continue
            for entries, weights in read:
                index = (entries.mT if self.of_keys else entries).to(x.device)
                part = x.gather(-1, index[:, None].expand(*x.shape[:2], -1, -1))
                part = part.mT if self.of_keys else part
                part = part if weights is None else part * weights.to(x)[:, None]
                total = part if total is None else total + part
        return self._checked(total).to(self.products[0].dtype)

    def _checked(self, total: Tensor | None) -> Tensor:
        if total is None:
            raise ValueError("a contextual bias needs at least one table")
        return total

    def _of_offsets(self) -> Tensor:
        by_axis = len(self.products) > 1
        other = self.q if self.of_keys else self.k
        rows = by_axis and other.whole  # a line of places stands for all that share it
        total: Tensor | None = None
        for axis, (x, entries) in enumerate(zip(self.products, self.entries, strict=True)):
            on = axis if by_axis else None
            q, k = _placed(self.q, on, rows and self.of_keys), _placed(self.k, on, rows and not self.of_keys)
            index = Table(entries[None], q, k).dense()  # (B|1, 1, Nq, Nk), or S_a on the other side
            index = index.transpose(-1, -2) if self.of_keys else index
            part = x.gather(-1, index.expand(x.shape[0], x.shape[1], -1, -1))
            if rows:
                part = part[(..., *[None] * axis, slice(None), *[None] * (other.axes - axis - 1))]
            total = part if total is None else total + part
        total = self._checked(total).flatten(3)
        return total.transpose(-1, -2) if self.of_keys else total


def _placed(at: Positions, axis: int | None, line: bool) -> Positions:
    """The tokens that have a place; on one axis alone; each place of it once. The same object for all blocks."""

    def make() -> Positions:
        if axis is None:
            return at.with_prefix(0)
        if line:
            return Positions.grid(at.one_extent[axis : axis + 1], at.coords.device)
        return Positions(at.coords[..., axis : axis + 1], at.largest[axis : axis + 1], on_grid=at.on_grid)

    return at.memoize(("placed", axis, line), make)
