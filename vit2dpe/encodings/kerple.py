"""`kerple`: a penalty that grows as the logarithm or a power of distance, two learned numbers a head.

    form=log      bias_h(q, k) = -r1_h ln(1 + r2_h ‖q - k‖),    r1, r2 > 0
    form=power    bias_h(q, k) = -r1_h ‖q - k‖^r2_h,            r1 > 0, 0 < r2 < 2

Within these bounds the kernels are conditionally positive definite in Euclidean distance, whatever the number of axes.
With r2 = 1 the second is `alibi`.

Sources: KERPLE, arXiv 2205.09921 (one axis, causal); chijames/KERPLE, `megatron/mpu/layers.py` (`ParallelKerpleLog`,
`ParallelKerplePower`).

How ours differs: any number of axes, any places, both directions; prefix tokens stand nowhere and are not penalised.
The original's forward writes r1, r2 >= 0.01 and r2 <= 2 over its parameters; here r1 = exp(log_r1), r2 = exp(raw_r2),
with the power 2 σ(raw_r2), so that bounds hold and gradients do not end there. They start where the original's do: r1
from U(0, 2) and r2 from U(0, 1), with the power the other way round, none below 0.01.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..positions import DISTANCES, Positions
from ..signal import Distance, Table
from .base import PositionEncoding
from .mlp import lifted
from .tables import looked_up

LEAST = 0.01  # that r1 and r2 start from


class Kerple(PositionEncoding):
    """Kernelized relative bias; every block owns its two numbers a head.

    Args:
        heads: H.
        form: "log" or "power".
        distance: "euclidean", "squared", "manhattan" or "chebyshev", as in `alibi`.
        shared: the same numbers for all blocks.
    """

    relative = True
    per_block = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(self, heads: int, *, form: str = "log", distance: str = "euclidean", shared: bool = False) -> None:
        super().__init__()
        if form not in ("log", "power"):
            raise unknown("form of kerple", form, ("log", "power"))
        if distance not in DISTANCES:
            raise unknown("distance of kerple", distance, DISTANCES)
        if heads < 1:
            raise ConfigError(f"kerple needs at least one head, got heads={heads}")
        self.form, self.distance, self.per_block = form, distance, not shared
        self.log_r1 = nn.Parameter(torch.empty(heads))
        self.raw_r2 = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.uniform_(self.log_r1, LEAST, 2.0 if self.form == "log" else 1.0).log_()
        nn.init.uniform_(self.raw_r2, LEAST, 1.0)
        self.raw_r2.copy_(self.raw_r2.log() if self.form == "log" else self.raw_r2.logit(eps=LEAST / 2))

    def numbers(self) -> tuple[Tensor, Tensor]:
        """r1 and r2, each (H,), in float32 at least."""
        raw = lifted(self.raw_r2)
        return lifted(self.log_r1).exp(), raw.exp() if self.form == "log" else 2 * raw.sigmoid()

    def bias(self, q: Positions, k: Positions) -> Distance | Table:
        r1, r2 = self.numbers()
        return looked_up(Distance(q, k, r1, dtype=self.dtype, kind=self.distance, bend=self.form, rate=r2))

    def extra_repr(self) -> str:
        return f"heads={len(self.log_r1)}, form={self.form!r}, distance={self.distance!r}"
