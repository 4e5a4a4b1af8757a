"""`decomposed`: for each axis a learned vector for each offset, contracted with the query and added to the logits.

    logit(i, j) += Σ_a q_i · rel_pos_a[(p_i - p_j)_a + S_a - 1],    tables (2 S_a - 1, Dh), one for all heads

q is the projected one, behind its norm, before rotation and before the scale of q·k: this term has the scale 1. Names
of the tables are the originals', `rel_pos_t`, `rel_pos_h`, `rel_pos_w`: the last ones of as many axes as there are.

Sources: MViTv2, arXiv 2112.01526, `attention.py` (`cal_rel_pos_spatial`); ViTDet, arXiv 2203.16527; SAM, arXiv
2304.02643; timm, `vision_transformer_sam.py` (`get_decomposed_rel_pos_bias`) and `mvitv2.py` (`cal_rel_pos_type`).

How ours differs: one to three axes; tokens anywhere on the grid; drawn as MViTv2's are, N(0, 0.02), where SAM's start
at zero; no bias for pairs with prefix tokens, as in MViTv2. At another extent each table is resized linearly, as SAM
and ViTDet do.

Limits: whole coordinates only; what lacks queries (a float mask of torch's own modules) cannot have it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..contextual import Contextual
from ..errors import ConfigError
from ..positions import Positions
from .base import PositionEncoding
from .mixed_pairs import resized_for_pairs
from .tables import axis_offsets, fitted, replace, viewed

NAMES = ("rel_pos_t", "rel_pos_h", "rel_pos_w")


class Decomposed(PositionEncoding):
    """A table of vectors over offsets along each axis; every block owns them.

    Args:
        head_dim: Dh.
        heads: H.
        grid: the sizes (S_1, ..., S_d) of the grid or window it is learned on, at most three.
    """

    relative = True
    continuous = False
    per_block = True
    contextual = True
    gives = frozenset({"bias"})
    policies = ("resize",)
    resizes = ("bilinear", "plain", "antialias", "geometric")

    def __init__(self, head_dim: int, heads: int, grid: Sequence[int]) -> None:
        super().__init__()
        if not 1 <= len(grid) <= len(NAMES) or any(size < 1 for size in grid):
            raise ConfigError(f"decomposed needs the sizes of one to three axes, each at least 1, got {tuple(grid)}")
        self.heads, self.axes = heads, len(grid)
        for name, size in zip(NAMES[-self.axes :], grid, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(2 * size - 1, head_dim)))
        self.reset_parameters()

    def tables(self) -> list[Tensor]:
        """(2 S_a - 1, Dh) of each axis."""
        return [getattr(self, name) for name in NAMES[-self.axes :]]

    def reset_parameters(self) -> None:
        for table in self.tables():
            nn.init.trunc_normal_(table, std=0.02)

    def bias(self, q: Positions, k: Positions) -> Contextual:
        if isinstance(q.extent, Tensor):
            tables = tuple(viewed(table.to(self.dtype)[None]) for table in self.tables())  # (1, T, Dh)
            return Contextual(tables, (), q, k, self.heads, read=resized_for_pairs(self.policy, tables))
        offsets = axis_offsets(q, k, self.axes, q.coords.device)
        vectors = [
            viewed(self._resized(axis, 2 * size - 1).to(self.dtype)[None]) for axis, size in enumerate(q.one_extent)
        ]  # (1, 2 S_a - 1, Dh)
        entries = [offset + (size - 1) for offset, size in zip(offsets, q.one_extent, strict=True)]
        return Contextual(tuple(vectors), tuple(entries), q, k, self.heads)

    def _resized(self, axis: int, size: int) -> Tensor:
        return fitted(self, self.tables()[axis].t(), (size,), "bilinear", axis).t()

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, ...]) -> None:
        for axis, (table, size) in enumerate(zip(self.tables(), grid, strict=True)):
            replace(table, self._resized(axis, 2 * size - 1).contiguous())

    def extra_repr(self) -> str:
        sizes = tuple((len(table) + 1) // 2 for table in self.tables())
        return f"head_dim={self.tables()[0].shape[1]}, heads={self.heads}, grid={sizes}"
