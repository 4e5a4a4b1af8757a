"""`fire`: a bias that a small network computes from the relative distance, progressively interpolated.

    bias_h(q, k) = MLP( ψ(‖q - k‖) / ψ(reach) )_h,    ψ(x) = log(1 + c x)

c > 0 is learned, a number for all heads. `reach` is the largest distance there is, so the argument stays below 1 at
every size: the diagonal of the extent ("extent"), or on one axis the query's own place, at least a learned L ("query").

Source: FIRE, arXiv 2310.04418 (one axis, causal: reach is max(L, place of the query)).

How ours differs: Euclidean distance on any number of axes. Beyond one axis there is no past for a query's place to
measure, so reach is the diagonal, and L, which it always exceeds, is not there. The network is evaluated once for each
offset, of fractional places (jitter) for each pair.

Limits: "query" is not relative: moving all tokens moves the queries' places. Every block evaluates a network of its
own: a forward of a ViT of 12 blocks launches 413 kernels on a GPU, with `shared=true` 292, without an encoding 253
(`python -m benchmarks.devtrace fire --depth 12`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..positions import Positions, exact, numbers
from ..signal import Table
from .base import PositionEncoding
from .mlp import PositionLinear, lifted, lifted_mlp, redraw
from .offsets import Lattice, all_offsets, kept, lattice
from .tables import channels_first, offset_grid


class Fire(PositionEncoding):
    """Functional interpolation for relative positions; every block owns a network.

    Args:
        heads: H.
        grid: the training grid; half its length is where L starts.
        hidden: width of the hidden layer.
        reach: "extent" or, on one axis, "query". Default: "query" on one axis.
        shared: one network for all blocks.
    """

    relative = True
    per_block = True
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(
        self,
        heads: int,
        grid: Sequence[int],
        *,
        hidden: int = 32,
        reach: str | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        reach = reach or ("query" if len(grid) == 1 else "extent")
        if reach not in ("extent", "query"):
            raise unknown("reach of fire", reach, ("extent", "query"))
        if not grid or any(size < 1 for size in grid) or hidden < 1:
            raise ConfigError(f"fire needs a grid and a hidden width of at least 1, got {tuple(grid)} and {hidden}")
        if reach == "query" and len(grid) != 1:
            raise ConfigError(f"reach='query' is for one axis, where the past is a line; the grid is {tuple(grid)}")
        self.grid, self.reach = tuple(grid), reach
        self.per_block, self.relative = not shared, reach == "extent"
        self.log_scale = nn.Parameter(torch.empty(()))  # c = exp(log_scale) > 0
        self.threshold = nn.Parameter(torch.empty(())) if reach == "query" else None
        self.mlp = nn.Sequential(PositionLinear(1, hidden), nn.ReLU(), PositionLinear(hidden, heads))
        self.reset_parameters()

    def measures_extent(self) -> bool:
        return self.reach == "extent" or super().measures_extent()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(0.1))
        if self.threshold is not None:
            nn.init.constant_(self.threshold, max(1.0, _diagonal(self.grid) / 2))
        redraw(self.mlp)

    def bias(self, q: Positions, k: Positions) -> Tensor | Table:
        if self.threshold is None:
            like = lifted(self.log_scale)
            found = None if isinstance(q.extent, Tensor) else lattice(q, k, len(self.grid))  # a reach for each grid
            key = ("fire", len(self.grid), like.dtype)
            far, reach = kept(q, k, key, lambda: self._distances(q, k, found, like))  # the same for all blocks
            bias = channels_first(self._network(far, reach))
            return bias.transpose(0, 1) if found is None else Table(bias, *found[:2])
        if q.axes != 1:
            raise ValueError(f"this fire was built for 1 axis, the positions have {q.axes}")
        place, other = exact(q.coords)[..., 0], exact(k.coords)[..., 0]
        far = (place[..., :, None] - other[..., None, :]).abs()  # (B|1, Nq, Nk)
        reach = torch.maximum(place.abs()[..., None], self.threshold.abs().to(place.device))
        return self._network(far, reach).permute(0, 3, 1, 2)

    def _distances(self, q: Positions, k: Positions, found: Lattice | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """(2 S_1 - 1, ...) that of each offset of the extent at hand, or (B|1, Nq, Nk) of each pair, and the largest
        that the extent has; computed in float64."""
        offsets = all_offsets(q, k, found)
        if found is not None and found[2] is None:
            far = offsets.square().sum(-1).sqrt()
            reach = far.max()
        elif isinstance(q.extent, Tensor):
            far, reach = torch.linalg.vector_norm(offsets, dim=-1), self._diagonals(q)
        else:  # the norm has a gradient at 0, the root has none
            far = torch.linalg.vector_norm(offsets, dim=-1)
            whole = offset_grid(q, k, len(self.grid))
            reach = (whole * numbers(q.spacing, whole.device) if q.spacing else whole).square().sum(-1).sqrt().max()
        return far.to(like.dtype).to(like.device), reach.to(like.dtype).to(like.device)

    def _diagonals(self, at: Positions) -> Tensor:
        """(B|1, N|1, 1) float64, of the grid that each query is on."""
        steps = numbers(at.spacing or [1.0] * at.axes, at.coords.device)
        far: Tensor = torch.linalg.vector_norm((at.sizes(prefix=False) - 1) * steps, dim=-1, keepdim=True)
        return far

    def _network(self, far: Tensor, reach: Tensor) -> Tensor:
        """(...) distances, reach broadcast to them -> (..., H)."""
        c = lifted(self.log_scale).exp()
        far, reach = (x.to(c.dtype).to(c.device) for x in (far, reach))  # and back: no float64 where there is none
        share = torch.log1p(c * far) / torch.log1p(c * reach).clamp(min=1e-6)
        return lifted_mlp(self.mlp, share[..., None])

    def extra_repr(self) -> str:
        return f"grid={self.grid}, reach={self.reach!r}"


def _diagonal(extent: Sequence[int]) -> float:
    return float(sum((size - 1) ** 2 for size in extent) ** 0.5)
