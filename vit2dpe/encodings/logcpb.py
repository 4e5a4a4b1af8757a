"""`logcpb`: a bias that a small network computes from the logarithm of the offset (Swin V2).

    bias_h(q, k) = 16 σ(W₂ ReLU(W₁ c + b₁))_h,    c_a = sign(u_a) log₂(1 + 8 |u_a|) / log₂ 8,    u_a = (q - k)_a / (S_a
    - 1)

and with `form=cr`, as in timm's `vit_relpos_*`, on offsets in patches and without a bound:

    bias_h(q, k) = (W₂ ReLU(W₁ c + b₁) + b₂)_h,    c_a = sign(Δ_a) ln(1 + |Δ_a|),    Δ = q - k

Sources: Swin V2, arXiv 2111.09883, `models/swin_transformer_v2.py`; timm, `swin_transformer_v2.py` (`cpb_mlp`) and
`layers/pos_embed_rel.py` (`RelPosMlp`, whose dropout of 1/8 in training is left out).

How ours differs: any number of axes; evaluated once for each offset that the grid has, then looked up, of fractional
places (jitter) for each pair, where a backward keeps two activations of the hidden layer a pair; an axis of one patch
has u = 0 (the original divides by zero). S is the training grid and stays, in the state_dict: at another extent
the network is evaluated at larger offsets, as Swin V2 does with `pretrained_window_size`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..positions import Positions, numbers
from ..signal import Table
from .mlp import PositionLinear, lifted, lifted_mlp, redraw
from .offsets import all_offsets, kept, lattice
from .on_grid import OnGrid
from .tables import channels_first


class LogCPB(OnGrid):
    """Log-spaced continuous position bias; every block owns a network.

    Args:
        heads: H.
        grid: the sizes (S_1, ..., S_d) of the training grid or window.
        hidden: width of the hidden layer.
        shared: one network for all blocks.
        form: "swin" or "cr".
    """

    relative = True
    per_block = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(
        self, heads: int, grid: Sequence[int], *, hidden: int = 512, shared: bool = False, form: str = "swin"
    ) -> None:
        super().__init__()
        if form not in ("swin", "cr"):
            raise unknown("form of logcpb", form, ("swin", "cr"))
        if not grid or any(size < 1 for size in grid) or hidden < 1:
            raise ConfigError(f"logcpb needs a grid and a hidden width of at least 1, got {tuple(grid)} and {hidden}")
        self.per_block = not shared
        self.grid, self.form = tuple(grid), form
        last = PositionLinear(hidden, heads, bias=form == "cr")
        self.cpb_mlp = nn.Sequential(PositionLinear(len(grid), hidden), nn.ReLU(), last)

    def reset_parameters(self) -> None:
        redraw(self.cpb_mlp)

    def bias(self, q: Positions, k: Positions) -> Tensor | Table:
        like = lifted(self.cpb_mlp[0].weight)  # type: ignore[arg-type]
        found = lattice(q, k, len(self.grid))

        def made() -> Tensor:
            return self._coordinates(all_offsets(q, k, found)).to(like.device, like.dtype)

        c = kept(q, k, ("logcpb", self.grid, self.form, like.dtype), made)  # the same for all blocks
        bias = channels_first(lifted_mlp(self.cpb_mlp, c))  # (H, 2 S_1 - 1, ...)
        bias = bias if self.form == "cr" else 16 * bias.sigmoid()
        return bias.transpose(0, 1) if found is None else Table(bias, *found[:2])

    def _coordinates(self, offsets: Tensor) -> Tensor:
        """(..., d) what the network sees of offsets, float64."""
        if self.form == "cr":
            return offsets.sign() * torch.log(1 + offsets.abs())
        u = offsets / numbers([max(1, size - 1) for size in self.grid], offsets.device)
        return u.sign() * torch.log2(1 + 8 * u.abs()) / math.log2(8)

    def extra_repr(self) -> str:
        return f"grid={self.grid}"
