"""`relative`: a learned number for each offset between two places and each head, added to the logits.

    bias_h(q, k) = relative_position_bias_table[h, q - k + S - 1],    table (H, 2 S_1 - 1, ..., 2 S_d - 1)

With `prefix=true`, as in BEiT, the one exception from the rule that prefix tokens get no bias: three numbers a head,
`prefix_bias` (H, 3), from a prefix token to a patch, from a patch to a prefix token, and between prefix tokens.

With `symmetric=true`, as in LeViT and TinyViT, the sign of an offset counts along no axis:

    bias_h(q, k) = attention_biases[h, |q - k|],    attention_biases (H, S_1, ..., S_d)

and theirs, flat (H, ΠS), is taken on loading; `attention_biases.flatten(1)` is theirs again.

Sources: Swin, arXiv 2103.14030, `models/swin_transformer.py`; BEiT, arXiv 2106.08254; timm, `layers/pos_embed_rel.py`;
LeViT, arXiv 2104.01136; TinyViT, arXiv 2207.10666; timm, `levit.py`, `tiny_vit.py`.

How ours differs: head-major with the grid in its shape (Swin's is flat, (ΠT, H), and its window has to be guessed from
a square root); any number of axes; the whole grid of a ViT or the window of a Swin alike; no index buffer. At another
extent the table is resized bicubic, without antialias, as Swin's own loader does; a symmetric one is mirrored first, so
that the entry of offset 0 keeps its value (LeViT's and TinyViT's loaders resize what is not mirrored, and move it).
Between whole offsets the table is read bilinearly, or bicubically (`between.py`): places that a policy scales have a
table of their offsets, other fractional places (jitter) a matrix of all pairs, (B|1, H, N, N) in every block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..positions import Positions
from ..signal import Dense, Table
from .base import PositionEncoding
from .between import check_sample
from .mixed_offsets import resized_by_sample, scaled_by_sample
from .offsets import read_at_offsets, with_prefix
from .tables import check_extents, fitted, replace


class RelativeBias(PositionEncoding):
    """A table of biases over offsets, one for each head; by default every block owns one.

    Args:
        heads: H.
        grid: the sizes (S_1, ..., S_d) of the grid or window it is learned on.
        shared: one table for all blocks instead of one each.
        resize: how the table meets another extent: "bicubic" (Swin's own loader: all offsets are stretched alike) or
            "geometric" (BEiT, timm: near offsets keep their entries, far ones are stretched).
        prefix: three learned numbers a head for pairs with prefix tokens, instead of none.
        sample: how the table is read at fractional offsets: "bilinear" or "bicubic".
        symmetric: one entry for offsets of either sign along each axis.
    """

    relative = True
    per_block = True
    gives = frozenset({"bias"})
    policies = ("resize", "interpolate")
    resizes = ("plain", "antialias", "bilinear", "geometric")

    def __init__(
        self,
        heads: int,
        grid: Sequence[int],
        *,
        shared: bool = False,
        resize: str = "bicubic",
        prefix: bool = False,
        sample: str = "bilinear",
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if resize not in ("bicubic", "geometric"):
            raise unknown("resize of relative", resize, ("bicubic", "geometric"))
        self.resize, self.sample = resize, check_sample("relative", sample)
        if not grid or any(size < 1 for size in grid):
            raise ConfigError(f"relative needs the sizes of its grid, each at least 1, got {tuple(grid)}")
        self.per_block = not shared
        self.relative_position_bias_table = self.attention_biases = None
        if symmetric:
            self.attention_biases = nn.Parameter(torch.empty(heads, *grid))
        else:
            self.relative_position_bias_table = nn.Parameter(torch.empty(heads, *(2 * size - 1 for size in grid)))
        self.prefix_bias = nn.Parameter(torch.empty(heads, 3)) if prefix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self._learned(), std=0.02)
        if self.prefix_bias is not None:
            nn.init.trunc_normal_(self.prefix_bias, std=0.02)

    def bias(self, q: Positions, k: Positions) -> Table | Dense:
        check_extents(q, k, self._learned().ndim - 1)
        if isinstance(q.extent, Tensor):
            return self._by_sample(q, k)
        sizes = tuple(2 * size - 1 for size in q.extent)
        table = self._resized(sizes).to(self.dtype)
        scaled = scaled_by_sample(table, q, k, self.sample)
        if scaled is not None:
            return Dense(with_prefix(scaled, q.prefix, k.prefix, self._of_prefix()))
        return read_at_offsets(table, q, k, self._of_prefix(), self.sample)

    def _by_sample(self, q: Positions, k: Positions) -> Dense:
        mirrored = self.attention_biases is not None
        table = (_mirrored(self._learned()) if mirrored else self._learned()).to(self.dtype)
        bias = resized_by_sample(self.policy, table, q, k, self._own(), self.sample, mirrored)
        return Dense(with_prefix(bias, q.prefix, k.prefix, self._of_prefix()))

    def _of_prefix(self) -> Tensor | None:
        return None if self.prefix_bias is None else self.prefix_bias.to(self.dtype)

    def _own(self) -> str:
        return "geometric" if self.resize == "geometric" else "plain"

    def _learned(self) -> Tensor:
        found = self.relative_position_bias_table if self.attention_biases is None else self.attention_biases
        if found is None:
            raise ConfigError("relative has lost its table")
        return found

    def _resized(self, sizes: tuple[int, ...]) -> Tensor:
        """(H, *sizes) over offsets of either sign."""
        own = self._own()
        if self.attention_biases is None:
            return fitted(self, self._learned(), sizes, own)
        return _mirrored(_half(fitted(self, _mirrored(self._learned()), sizes, own)))

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, ...]) -> None:
        table = self._resized(tuple(2 * size - 1 for size in grid))
        replace(self._learned(), (table if self.attention_biases is None else _half(table)).contiguous())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        own, given = self.attention_biases, state_dict.get(f"{prefix}attention_biases")
        if own is not None and given is not None and given.shape == own.flatten(1).shape:
            state_dict[f"{prefix}attention_biases"] = given.view(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        heads, *sizes = self._learned().shape
        symmetric = self.attention_biases is not None
        grid = tuple(sizes) if symmetric else tuple((size + 1) // 2 for size in sizes)
        return f"heads={heads}, grid={grid}" + ", symmetric=True" * symmetric


def _mirrored(table: Tensor) -> Tensor:
    """(H, S_1, ..., S_d) -> (H, 2 S_1 - 1, ..., 2 S_d - 1): entry |Δ| at Δ."""
    for axis, size in enumerate(table.shape[1:], start=1):
        table = table.index_select(axis, torch.arange(1 - size, size, device=table.device).abs())
    return table


def _half(table: Tensor) -> Tensor:
    """Of a table over offsets those without sign."""
    return table[(slice(None), *(slice(size // 2, None) for size in table.shape[1:]))]
