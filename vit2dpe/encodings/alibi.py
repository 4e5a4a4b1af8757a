"""`alibi`: a penalty that grows with distance, added to the logits.

    bias_h(q, k) = -m_h ‖q - k‖₂,    m_h = 2^(-8 h / H) for h = 1..H, H a power of two

With `distance="squared"` it is -m_h ‖q - k‖², which is a product: ‖q - k‖² = ‖q‖² - 2⟨q, k⟩ + ‖k‖². It reaches
attention as d + 2 additional channels of q and k instead of a matrix of N² entries, twice as many where a slope is no
short number. Euclidean distance has no such form.

For other H the slopes are those of the power of two below, then every second one of the power above.

Limits: squares of places are exact in float32 up to a few thousand patches.

Sources: ALiBi, arXiv 2108.12409 (one axis, `get_slopes`); CROMA, arXiv 2311.00566 (Euclidean, two axes).

How ours differs: any number of axes and heads, any places; prefix tokens stand nowhere, so they are neither
penalised nor penalise (with the class token in a corner the sharpest heads would see 13 patches of 196).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..errors import ConfigError, unknown
from ..positions import Positions, exact, numbers
from ..signal import Distance, LowRank
from .base import PositionEncoding


class Alibi(PositionEncoding):
    """Linear distance bias; nothing learned, nothing stored.

    Args:
        heads: H, any number.
        distance: "euclidean" or "squared".
    """

    relative = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, heads: int, *, distance: str = "euclidean") -> None:
        super().__init__()
        if distance not in ("euclidean", "squared"):
            raise unknown("distance of alibi", distance, ("euclidean", "squared"))
        if heads < 1:
            raise ConfigError(f"alibi needs at least one head, got heads={heads}")
        self.slopes, self.distance = slopes(heads), distance

    def bias(self, q: Positions, k: Positions) -> Distance | LowRank:
        if self.distance == "squared":
            return self._channels(q, k)
        return Distance(q, k, tuple(self.slopes), dtype=self.dtype)

    def _channels(self, q: Positions, k: Positions) -> LowRank:
        """-m ‖q - k‖² as fq · fk, places measured from the middle of the grid, where squares are smallest."""
        middle = numbers([(size - 1) / 2 for size in q.extent], q.coords.device)
        p, o = (coords - middle.to(coords.device) for coords in (exact(q.coords), exact(k.coords)))  # (B|1, N, d)
        fq = torch.cat([p.square().sum(-1, keepdim=True), torch.ones_like(p[..., :1]), -2 * p], dim=-1)
        fk = torch.cat([torch.ones_like(o[..., :1]), o.square().sum(-1, keepdim=True), o], dim=-1)
        # Of squares of up to 14 bits times a slope of up to 10 no bit is lost in float32, so that they cancel exactly;
        # what is left of a slope such as 2^-½ is small, and comes after that.
        short = [_rounded(m, bits=10) for m in self.slopes]
        rest = [m - s for m, s in zip(self.slopes, short, strict=True)]
        parts = [short, rest] if any(rest) else [short]
        slope = numbers([m for part in parts for m in part], fq.device).view(len(parts), -1, 1, 1)
        fq = torch.cat([-part * fq[:, None] for part in slope], dim=-1).to(self.dtype)
        fk = torch.cat([fk] * len(parts), dim=-1)[:, None].to(self.dtype)
        fq, fk = fq.to(q.coords.device), fk.to(q.coords.device)
        # Zero channels: no bias for what has no place.
        return LowRank(F.pad(fq, (0, 0, q.prefix, 0)), F.pad(fk, (0, 0, k.prefix, 0)))

    def extra_repr(self) -> str:
        return f"heads={len(self.slopes)}, distance={self.distance!r}"


def _rounded(x: float, bits: int) -> float:
    """To so many significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def slopes(heads: int) -> list[float]:
    """m_1..m_H, the steepest first among those of the power of two below."""
    below = 2 ** math.floor(math.log2(heads))
    geometric = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    between = [2 ** (-4 * (h + 1) / below) for h in range(0, 2 * (heads - below), 2)]
    return geometric + between
