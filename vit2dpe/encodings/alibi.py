"""`alibi`: a penalty that grows with distance, added to the logits.

    bias_h(q, k) = -m_h ‖q - k‖₂,    m_h = 2^(-8 h / H) for h = 1..H, H a power of two

For other H the slopes are those of the power of two below, then every second one of the power above.

Sources: ALiBi, arXiv 2108.12409 (one axis, `get_slopes`); CROMA, arXiv 2311.00566 (Euclidean, two axes).

How ours differs: any number of axes and heads, any places; prefix tokens stand nowhere, so they are neither
penalised nor penalise (with the class token in a corner the sharpest heads would see 13 patches of 196).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions, distance
from .base import PositionEncoding


class Alibi(PositionEncoding):
    """Linear distance bias; nothing learned, nothing stored.

    Args:
        heads: H, any number.
    """

    relative = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, heads: int) -> None:
        super().__init__()
        if heads < 1:
            raise ConfigError(f"alibi needs at least one head, got heads={heads}")
        self.slopes = slopes(heads)

    def bias(self, q: Positions, k: Positions) -> Tensor:
        far = distance(q, k)  # (B|1, Nq, Nk) float64; a head at a time, to hold one such matrix and not H
        return torch.stack([(-slope * far).to(self.dtype) for slope in self.slopes], dim=1)

    def extra_repr(self) -> str:
        return f"heads={len(self.slopes)}"


def slopes(heads: int) -> list[float]:
    """m_1..m_H, the steepest first among those of the power of two below."""
    below = 2 ** math.floor(math.log2(heads))
    geometric = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    between = [2 ** (-4 * (h + 1) / below) for h in range(0, 2 * (heads - below), 2)]
    return geometric + between
