"""`shaw`: a learned vector for each offset up to a clipped distance, contracted with the query and added to the logits.

    logit(i, j) += s (q_i · relative_key[c(p_j - p_i)] [+ k_j · relative_query[c(p_j - p_i)]])
    c_a(Δ) = min(max(Δ_a, -K), K) + K

    sides=q    queries alone, s = Dh^-1/2; relative_key (2 K + 1, ..., 2 K + 1, Dh), one for all heads
    sides=qk   queries and keys, as DeBERTa (content to position, position to content), s = (3 Dh)^-1/2; relative_key
               and relative_query (H, 2 K + 1, ..., 2 K + 1, Dh)

K is the clip. q and k are the projected ones, behind their norms and before rotation. DeBERTa scales q·k by (3 Dh)^-1/2
too: a model does with `scale=`, where it has that argument.

Sources: Shaw et al., arXiv 1803.02155, equation 4 and section 3.2 (on keys alone: what it adds to values is out of
scope here). DeBERTa, arXiv 2006.03654, equation 4; transformers, `modeling_deberta_v2.py`,
`disentangled_attention_bias`.

How ours differs: any number of axes, a full table over all offsets of them, and so K = 8 where Shaw has 16 on a line
(from 2 on it made little difference there); no bias for pairs with prefix tokens. Beyond the clipped distance all
offsets share a vector, and so the table serves every size as it is. DeBERTa projects one table of embeddings in each
block, its buckets are logarithmic where `position_buckets` says so, and its table ends at K - 1 on one side; here the
vectors are learned as they are used, with which every projection can be written.

Limits: whole coordinates only; what lacks queries (a float mask of torch's own modules) cannot have it. With a rotation
beside it, sides=qk does not decode from a cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contextual import Contextual
from ..errors import ConfigError, unknown
from ..positions import Positions
from ..signal import Bias
from .base import PositionEncoding
from .mixed_pairs import entries_of_pairs
from .tables import axis_offsets, flat_entries, viewed

SIDES = ("q", "qk")


class Shaw(PositionEncoding):
    """A table of vectors over clipped offsets; every block owns one.

    Args:
        head_dim: Dh.
        heads: H.
        axes: d.
        clip: K, the largest distance along an axis that has a vector of its own, in patches.
        sides: "q", or "qk" for a term of keys too and vectors for each head, as DeBERTa has it.
    """

    relative = True
    continuous = False
    per_block = True
    contextual = True
    gives = frozenset({"bias"})
    policies = ("extrapolate",)

    def __init__(self, head_dim: int, heads: int, *, axes: int = 2, clip: int = 8, sides: str = "q") -> None:
        super().__init__()
        if axes < 1 or clip < 1:
            raise ConfigError(f"shaw needs an axis and a clip of at least 1, got axes={axes} and clip={clip}")
        if sides not in SIDES:
            raise unknown("sides of shaw", sides, SIDES)
        self.heads, self.clip, self.sides = heads, clip, sides
        shape = [*([heads] if sides == "qk" else []), *[2 * clip + 1] * axes, head_dim]
        self.relative_key = nn.Parameter(torch.empty(*shape))
        self.relative_query = nn.Parameter(torch.empty(*shape)) if sides == "qk" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.parameters(recurse=False):
            nn.init.trunc_normal_(table, std=0.02)

    def bias(self, q: Positions, k: Positions) -> Contextual:
        both, width = self.relative_query is not None, self.relative_key.shape[-1]
        vectors, sizes = self._vectors(self.relative_key), self.relative_key.shape[both:-1]
        scale = 1 / math.sqrt(3 * width if both else width)
        if isinstance(q.extent, Tensor):
            read = entries_of_pairs(("shaw", self.clip), self._clipped, sizes)
            return Contextual((vectors,), (), q, k, self.heads, scale, read=read)
        along = [self._clipped(offset) for offset in axis_offsets(q, k, len(sizes), q.coords.device)]
        return Contextual((vectors,), (flat_entries(along, sizes),), q, k, self.heads, scale)

    def _bias(self, q: Positions, k: Positions) -> tuple[Bias, ...]:
        term = self.bias(q, k)
        if self.relative_query is None:
            return (term,)
        return term, term._replace(vectors=(self._vectors(self.relative_query),), of_keys=True)

    def _vectors(self, table: Tensor) -> Tensor:
        """(1|H, E, Dh)"""
        flat = table.to(self.dtype).flatten(0 if self.relative_query is None else 1, -2)
        return viewed(flat[None] if self.relative_query is None else flat)

    def _clipped(self, offset: Tensor) -> Tensor:
        return (-offset).clamp(-self.clip, self.clip) + self.clip

    def extra_repr(self) -> str:
        axes, width = self.relative_key.ndim - 1 - (self.sides == "qk"), self.relative_key.shape[-1]
        return f"head_dim={width}, heads={self.heads}, axes={axes}, clip={self.clip}, sides={self.sides!r}"
