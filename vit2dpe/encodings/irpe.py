"""`irpe`: a learned vector for each bucket of offsets, exact when near, contracted with the query (contextual product).

    logit(i, j) += Dh^-1/2 · q_i · lookup_table_weight[:, :, f(Δ_1) (2 b + 1) + f(Δ_2) + ...],    Δ = p_i - p_j
    f(x) = x if |x| <= α, else sign(x) min(round(α + (β - α) ln(|x| / α) / ln(γ / α)), β), and b is added to it

with α, β, γ = 1, 2, 8 times `ratio` and b = ⌊β⌋: at 1.9 each of 0 and ±1 has a bucket, 2 and 3 share one, and so do 4
and more, 7 an axis. Table (1, Dh, (2 b + 1)^d), one for all heads. q is the projected one, behind its norm and
before rotation.

Source: iRPE, arXiv 2107.14222, equation 18; microsoft/Cream, `irpe.py` (mode "contextual", method "product", on keys:
`rpe_k`).

How ours differs: any number of axes; drawn N(0, 0.02) where the original starts at zero; no bucket of their own for
pairs with prefix tokens, which get no bias; on keys alone.

Limits: whole coordinates only; what lacks queries (a float mask of torch's own modules) cannot have it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contextual import Contextual
from ..errors import ConfigError
from ..positions import Positions
from .base import PositionEncoding
from .mixed_pairs import entries_of_pairs
from .tables import axis_offsets, flat_entries, viewed


class IRPE(PositionEncoding):
    """A table of vectors over buckets of offsets; every block owns one.

    Args:
        head_dim: Dh.
        heads: H.
        axes: d.
        ratio: of the distances at which buckets begin to grow and end; more than 1/2, so that there are three an axis.
    """

    relative = True
    continuous = False
    per_block = True
    contextual = True
    gives = frozenset({"bias"})
    policies = ("extrapolate",)

    def __init__(self, head_dim: int, heads: int, *, axes: int = 2, ratio: float = 1.9) -> None:
        super().__init__()
        if axes < 1 or not 0.5 <= ratio <= 64:
            raise ConfigError(f"irpe needs at least one axis and 0.5 <= ratio <= 64, got {axes} and {ratio}")
        self.heads, self.axes, self.ratio = heads, axes, float(ratio)
        self.lookup_table_weight = nn.Parameter(torch.empty(1, head_dim, self._side() ** axes))
        self.reset_parameters()

    def _side(self) -> int:
        """2 b + 1, the buckets of an axis."""
        return 2 * int(2 * self.ratio) + 1

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.lookup_table_weight, std=0.02)

    def bias(self, q: Positions, k: Positions) -> Contextual:
        sides = [self._side()] * self.axes
        vectors = viewed(self.lookup_table_weight.to(self.dtype).transpose(1, 2))  # (1, E, Dh)
        scale = 1 / math.sqrt(vectors.shape[-1])
        if isinstance(q.extent, Tensor):
            read = entries_of_pairs(("irpe", self.ratio), self.bucket, sides)
            return Contextual((vectors,), (), q, k, self.heads, scale, read=read)
        offsets = axis_offsets(q, k, self.axes, q.coords.device)
        entries = flat_entries([self.bucket(offset) for offset in offsets], sides)
        return Contextual((vectors,), (entries,), q, k, self.heads, scale)

    def bucket(self, offset: Tensor) -> Tensor:
        """0 to 2 b, of query minus key along an axis, whole numbers."""
        near, last, end = self.ratio, 2 * self.ratio, 8 * self.ratio
        # In float32 as the original, so that the edges of the buckets are where its checkpoints have them.
        far = offset.abs().clamp(min=1).float()
        grown = (near + (far / near).log() / math.log(end / near) * (last - near)).round().clamp(max=last).long()
        return torch.where(offset.abs() <= near, offset, offset.sign() * grown) + int(last)

    def extra_repr(self) -> str:
        return f"head_dim={self.lookup_table_weight.shape[1]}, heads={self.heads}, axes={self.axes}, ratio={self.ratio}"
