"""`fourier`: learned Fourier features of the coordinates through a small MLP, added to tokens.

    token(p) = W₂ GELU(W₁ γ(p) + b₁) + b₂,    γ(p) = [cos(p W_r) | sin(p W_r)] / √F,    W_r (d, F/2) ~ N(0, 1/γ²)

Source: Learnable Fourier Features, arXiv 2106.02795, algorithm 1 (one group).

How ours differs: coordinates are patches, not fractions of the image, so the spread 1/γ is in radians per patch: γ = 2
gives wavelengths around 12 patches. F = 2 ⌊D/4⌋ and the hidden width is D/2, unless given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions
from .base import PositionEncoding
from .mlp import PositionLinear, lifted, lifted_mlp, redraw


class Fourier(PositionEncoding):
    """Learned frequencies and an MLP; any place has a vector, so nothing is resized.

    Args:
        dim: width D.
        axes: d.
        features: F, even.
        hidden: width of the hidden layer.
        gamma: spread of the initial frequencies is 1/gamma radians per patch.
    """

    gives = frozenset({"token"})
    policies = ("extrapolate", "interpolate")

    def __init__(
        self, dim: int, *, axes: int = 2, features: int | None = None, hidden: int | None = None, gamma: float = 2.0
    ) -> None:
        super().__init__()
        features = 2 * max(1, dim // 4) if features is None else features
        hidden = max(1, dim // 2) if hidden is None else hidden
        if features < 2 or features % 2 or hidden < 1 or not gamma > 0:
            raise ConfigError(
                f"fourier needs an even number of features, a hidden width and gamma > 0: "
                f"got features={features}, hidden={hidden}, gamma={gamma}"
            )
        self.gamma = gamma
        self.freqs = nn.Parameter(torch.empty(axes, features // 2))
        self.mlp = nn.Sequential(PositionLinear(features, hidden), nn.GELU(), PositionLinear(hidden, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.freqs, std=1 / self.gamma)
        redraw(self.mlp)

    def token(self, at: Positions) -> Tensor:
        if at.axes != self.freqs.shape[0]:
            raise ValueError(f"the frequencies have {self.freqs.shape[0]} axes, the positions {at.axes}")
        freqs = lifted(self.freqs)
        angle = (at.coords.to(freqs.dtype)[..., None] * freqs).sum(-2)  # (B|1, N, F/2)
        return lifted_mlp(self.mlp, torch.cat([angle.cos(), angle.sin()], dim=-1) / (2 * angle.shape[-1]) ** 0.5)

    def extra_repr(self) -> str:
        return f"axes={self.freqs.shape[0]}, features={2 * self.freqs.shape[1]}, gamma={self.gamma:g}"
