"""`t5`: a learned number for each bucket of offsets, exact when near and logarithmic when far, added to the logits.

    bias_h(q, k) = Σ_a relative_attention_bias[a, bucket(k_a - q_a), h]

Of `buckets`, half serve each direction (all of them serve the past where `bidirectional` is off). In a direction the
first half are exact offsets 0, 1, 2, ..., the rest grow logarithmically up to `max_distance`, and the last takes all
beyond.

Sources: T5, arXiv 1910.10683; transformers, `modeling_t5.py` (`_relative_position_bucket`).

How ours differs: with several axes, a table for each, added up (iRPE's "cross"; on one axis it is T5's). One table
serves all blocks, as in T5. Between whole offsets, which T5 does not have, it is linear along each axis.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions
from ..signal import Table
from .base import PositionEncoding
from .offsets import along_axes, lattice, of_pairs


class T5Bias(PositionEncoding):
    """Bucketed relative bias.

    Args:
        heads: H.
        axes: d.
        buckets: how many; even, at least 4.
        max_distance: where the logarithmic buckets end, in patches.
        bidirectional: whether offsets of both signs are told apart.
    """

    relative = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(
        self, heads: int, *, axes: int = 2, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        exact = buckets // (4 if bidirectional else 2)
        if buckets < 4 or buckets % 2 or max_distance <= exact:
            raise ConfigError(
                f"t5 needs an even number of buckets, at least 4, and a max_distance beyond the exact ones ({exact}): "
                f"got buckets={buckets}, max_distance={max_distance}"
            )
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.relative_attention_bias = nn.Parameter(torch.empty(axes, buckets, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.relative_attention_bias, std=0.02)

    def bias(self, q: Positions, k: Positions) -> Tensor | Table:
        axes = self.relative_attention_bias.shape[0]
        found = lattice(q, k, axes)
        if found is None:  # (B|1, Nq, Nk, H) of all pairs
            pairs = reduce(add, (self._at(axis, of_pairs(q, k, axis)) for axis in range(axes)))
            return pairs.permute(0, 3, 1, 2)
        tables = []
        for axis, offset in enumerate(along_axes(*found, axes, q.coords.device)):  # q - k, (2 S - 1)
            table = self._at(axis, offset).t()  # (H, 2 S - 1)
            tables.append(table[(slice(None), *[None] * axis, slice(None), *[None] * (axes - axis - 1))])
        return Table(reduce(add, tables), *found[:2])

    def _at(self, axis: int, offset: Tensor) -> Tensor:
        """(..., H) of offsets q - k along an axis, int64, or float64 and then linear between whole ones."""
        weights = self.relative_attention_bias[axis].to(self.dtype)
        if not offset.is_floating_point():
            return weights[self.bucket(-offset)]
        low, device = offset.floor(), weights.device
        share = (offset - low).to(device, self.dtype)[..., None]
        near, far = (weights[self.bucket(-whole.long().to(device))] for whole in (low, low + 1))
        return near * (1 - share) + far * share

    def bucket(self, offset: Tensor) -> Tensor:
        """Bucket of key minus query, whole numbers."""
        count = self.relative_attention_bias.shape[1]
        start = torch.zeros_like(offset)
        if self.bidirectional:
            count //= 2
            start = (offset > 0).long() * count
            far = offset.abs()
        else:
            far = (-offset).clamp(min=0)
        near = count // 2
        # In float32 as the original, so that the edges of the buckets are where its checkpoints have them.
        grown = (far.clamp(min=1).float() / near).log() / math.log(self.max_distance / near) * (count - near)
        return start + torch.where(far < near, far, (near + grown.long()).clamp(max=count - 1))

    def extra_repr(self) -> str:
        axes, buckets, heads = self.relative_attention_bias.shape
        return f"heads={heads}, axes={axes}, buckets={buckets}, max_distance={self.max_distance}"
