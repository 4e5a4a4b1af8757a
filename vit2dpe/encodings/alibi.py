"""`alibi`: a penalty that grows with distance, added to the logits.

    bias_h(q, k) = -m_h ‖q - k‖,    m_h = 2^(-8 h / H) for h = 1..H, H a power of two

For other H the slopes are those of the power of two below, then every second one of the power above. The distance is
"euclidean", "manhattan" (the sum over axes), "chebyshev" (the largest of them), or "squared" (Euclidean), which is a
product: ‖q - k‖² = ‖q‖² - 2⟨q, k⟩ + ‖k‖². It reaches attention as d + 2 additional channels of q and k instead of a
matrix of N² entries, twice as many where a slope is no short number. The others have no such form, and learned slopes
too many digits for it.

With `slopes=learned`, m_h = exp(log_slopes[h]) is learned from there on; with `slopes=axes` it is one of each axis:

    -‖(m_h1 Δ_1, ..., m_hd Δ_d)‖, Δ = q - k;    with the squared distance -Σ_a m_ha Δ_a²

Limits: squares of places are exact in float32 up to a few thousand patches.

Sources: ALiBi, arXiv 2108.12409 (one axis, `get_slopes`); CROMA, arXiv 2311.00566 (Euclidean, two axes); RMT, arXiv
2309.11523 (Manhattan: its decay γ^(|Δ_1| + |Δ_2|) is this bias after the exponential); x-transformers until 2023
(`LearnedAlibiPositionalBias`: exp of what is learned, one for all blocks).

How ours differs: any number of axes and heads, any places; prefix tokens stand nowhere, so they are neither
penalised nor penalise (with the class token in a corner the sharpest heads would see 13 patches of 196). Asymmetric
slopes are left out: on a line they are heads that look one way, proposed by ALiBi's author for encoders, and what "one
way" is on d axes has a convention of its own, `lookhere`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError, unknown
from ..positions import DISTANCES, Positions, exact, numbers
from ..signal import Distance, LowRank, Table
from .base import PositionEncoding
from .mlp import lifted
from .tables import looked_up

SLOPES = ("fixed", "learned", "axes")


class Alibi(PositionEncoding):
    """Linear distance bias; by default nothing is learned, nothing stored.

    Args:
        heads: H, any number.
        axes: d, where each has slopes of its own.
        distance: "euclidean", "squared", "manhattan" or "chebyshev".
        slopes: "fixed", "learned" (one a head) or "axes" (learned, one a head and axis).
    """

    relative = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, heads: int, *, axes: int = 2, distance: str = "euclidean", slopes: str = "fixed") -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise unknown("distance of alibi", distance, DISTANCES)
        if slopes not in SLOPES:
            raise unknown("slopes of alibi", slopes, SLOPES)
        if heads < 1:
            raise ConfigError(f"alibi needs at least one head, got heads={heads}")
        self.slopes, self.distance = slopes_of(heads), distance
        shape = (heads, axes) if slopes == "axes" else (heads,)
        self.log_slopes = None if slopes == "fixed" else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.log_slopes is not None:
            start = torch.tensor(self.slopes, device=self.log_slopes.device).log()
            self.log_slopes.copy_(start[:, None].expand_as(self.log_slopes) if self.log_slopes.ndim == 2 else start)

    def bias(self, q: Positions, k: Positions) -> Distance | LowRank | Table:
        if self.log_slopes is None:
            if self.distance == "squared":
                return self._channels(q, k)
            return Distance(q, k, tuple(self.slopes), dtype=self.dtype, kind=self.distance)
        half = self.distance == "squared" and self.log_slopes.ndim == 2  # of a slope inside the square
        slopes = (lifted(self.log_slopes) * (0.5 if half else 1.0)).exp()
        return looked_up(Distance(q, k, slopes, dtype=self.dtype, kind=self.distance))

    def _channels(self, q: Positions, k: Positions) -> LowRank:
        """-m ‖q - k‖² as fq · fk, places measured from the middle of the grid, where squares are smallest."""
        middle = q.middle()
        p, o = (exact(at.coords) - middle for at in (q, k))  # (B|1, N, d)
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


def slopes_of(heads: int) -> list[float]:
    """m_1..m_H, the steepest first among those of the power of two below."""
    below = 2 ** math.floor(math.log2(heads))
    geometric = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    between = [2 ** (-4 * (h + 1) / below) for h in range(0, 2 * (heads - below), 2)]
    return geometric + between
