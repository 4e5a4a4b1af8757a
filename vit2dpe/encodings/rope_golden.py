"""`rope_golden`: every pair of every head turns along a direction of its own, spread evenly over all directions.

    angle_hf(p) = ⟨w_hf, p⟩,    w_hf = 2 ω_f u_n / (g - 1),    ω_f = low (high / low)^(f / (F - 1)),    n = h F + f

for pair f of F = Dh/2 of head h; g is the geometric mean side of the training grid. On two axes the unit vector u_n is
(sin α, cos α), rows first, at α = n π / φ, φ the golden ratio. On more, it is Gaussian quantiles of a golden (R_d)
sequence, normalised; on one it is 1.

Source: N-dimensional rotary embeddings, jerryxio.ng/posts/nd-rope (2025; code archibox/ropend).

How ours differs: places are measured in patches, by one step on all axes (the original's step differs by axis on grids
that are not square), so another size extrapolates by default; `interpolate` is the original's behaviour. On three axes
and more the golden sequence is (1/2 + (n + 1) a) mod 1, that of R_d as published, where the original takes n a mod 1: a
pair has another direction (off by up to 1.34), as evenly spread, and its frequencies do not carry over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import float64_device, numbers
from .linear import DirectionalRoPE
from .on_grid import OnGrid


class GoldenRoPE(OnGrid, DirectionalRoPE):
    """Fixed frequencies along quasi-uniform directions: no two pairs look the same way.

        w_hf = 2 ω_f u_n / (g - 1),    ω_f = low (high / low)^(f / (F - 1)),    n = h F + f

    for pair f of F = Dh/2 of head h, g the geometric mean side of the grid. On two axes u_n looks at angle n π / φ, φ
    the golden ratio; any few neighbours are spread evenly over half a turn. On more, directions are Gaussian quantiles
    of a golden (R_d) sequence, normalised.

    Args:
        head_dim: Dh, even.
        heads: H.
        grid: the training grid, on whose half-diagonal scale `low` and `high` are measured; it is in the state_dict.
        low, high: radians from the middle to the edge of the grid, for the slowest and the fastest pair.
    """

    def __init__(
        self, head_dim: int, heads: int, grid: Sequence[int], *, low: float = 1.0, high: float = 100.0
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ConfigError(f"rope_golden needs an even head width, got {head_dim}")
        if not 0 < low <= high:
            raise ConfigError(f"rope_golden needs 0 < low <= high, got low={low} and high={high}")
        self.head_dim, self.heads, self.grid, self.low, self.high = head_dim, heads, tuple(grid), low, high

    def frequencies(self, device: torch.device) -> Tensor:
        pairs, axes = self.head_dim // 2, len(self.grid)
        side = max(2.0, math.prod(self.grid) ** (1 / axes))
        step = torch.arange(pairs, dtype=torch.float64, device=float64_device(device)) / max(1, pairs - 1)
        # Tensors, not numbers: an ONNX file keeps a number in float32, and place 100 turns by it a hundred times.
        ratio, slowest = numbers([self.high / self.low, 2 * self.low / (side - 1)], device)
        omega = ratio**step * slowest
        directions: Tensor = golden_directions(self.heads * pairs, axes, device).view(axes, self.heads, pairs)
        w: Tensor = directions * omega
        return w

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}, grid={self.grid}, low={self.low:g}, high={self.high:g}"


def golden_directions(count: int, axes: int, device: torch.device) -> Tensor:
    """(d, count) unit vectors, any few neighbours spread evenly; float64. On a line all are 1."""
    device = float64_device(device)
    if axes == 1:
        return torch.ones(1, count, dtype=torch.float64, device=device)
    n = torch.arange(count, dtype=torch.float64, device=device)
    if axes == 2:
        angle = n * numbers([math.pi / ((1 + 5**0.5) / 2)], device)[0]  # see `frequencies`
        return torch.stack([angle.sin(), angle.cos()])
    golden = 2.0
    for _ in range(60):  # the fixed point of x = (1 + x)^(1 / (d + 1))
        golden = (1 + golden) ** (1 / (axes + 1))
    steps = numbers([golden ** -(axis + 1) for axis in range(axes)], device)
    quantile = (0.5 + (n + 1) * steps[:, None]).remainder(1.0)  # (d, count) in (0, 1)
    gauss = torch.erfinv((2 * quantile - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    directions: Tensor = gauss / gauss.norm(dim=0, keepdim=True)
    return directions
