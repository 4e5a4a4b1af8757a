"""`shaw`: a learned vector for each offset up to a clipped distance, contracted with the query and added to the logits.

    logit(i, j) += Dh^-1/2 · q_i · relative_key[c(p_j - p_i)],    c_a(Δ) = min(max(Δ_a, -K), K) + K

relative_key (2 K + 1, ..., 2 K + 1, Dh), one for all heads, K the clip. q is the projected one, behind its norm and
before rotation.

Source: Shaw et al., arXiv 1803.02155, equation 4 and section 3.2 (on keys alone: what it adds to values is out of
scope here).

How ours differs: any number of axes, a full table over all offsets of them, and so K = 8 where the paper has 16 on a
line (from 2 on it made little difference there); no bias for pairs with prefix tokens. Beyond the clipped distance all
offsets share a vector, and so the table serves every size as it is.

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


class Shaw(PositionEncoding):
    """A table of vectors over clipped offsets; every block owns one.

    Args:
        head_dim: Dh.
        heads: H.
        axes: d.
        clip: K, the largest distance along an axis that has a vector of its own, in patches.
    """

    relative = True
    continuous = False
    per_block = True
    contextual = True
    gives = frozenset({"bias"})
    policies = ("extrapolate",)

    def __init__(self, head_dim: int, heads: int, *, axes: int = 2, clip: int = 8) -> None:
        super().__init__()
        if axes < 1 or clip < 1:
            raise ConfigError(f"shaw needs an axis and a clip of at least 1, got axes={axes} and clip={clip}")
        self.heads, self.clip = heads, clip
        self.relative_key = nn.Parameter(torch.empty(*[2 * clip + 1] * axes, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_key, std=0.02)

    def bias(self, q: Positions, k: Positions) -> Contextual:
        sizes, width = self.relative_key.shape[:-1], self.relative_key.shape[-1]
        vectors = viewed(self.relative_key.to(self.dtype).flatten(0, -2)[None])  # (1, E, Dh)
        scale = 1 / math.sqrt(width)
        if isinstance(q.extent, Tensor):
            read = entries_of_pairs(("shaw", self.clip), self._clipped, sizes)
            return Contextual((vectors,), (), q, k, self.heads, scale, read=read)
        along = [self._clipped(offset) for offset in axis_offsets(q, k, len(sizes), q.coords.device)]
        return Contextual((vectors,), (flat_entries(along, sizes),), q, k, self.heads, scale)

    def _clipped(self, offset: Tensor) -> Tensor:
        return (-offset).clamp(-self.clip, self.clip) + self.clip

    def extra_repr(self) -> str:
        axes, width = self.relative_key.ndim - 1, self.relative_key.shape[-1]
        return f"head_dim={width}, heads={self.heads}, axes={axes}, clip={self.clip}"
