"""`Jitter`: any continuous encoding, its places moved a little at random in training.

    p' = p + ε,    ε uniform in ±amount patches, for each token and axis, drawn once a forward

Source: ComRoPE, arXiv 2506.03737 (coordinates jittered by half a patch; measured there to help every encoding beyond
the training size). How ours differs: a wrapper, so that it serves any encoding that takes fractional places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions
from .base import PositionEncoding


class Jitter(PositionEncoding):
    """Wraps an encoding; in evaluation it is that encoding.

    Args:
        encoding: a continuous one.
        amount: largest move along each axis, in patches.

    Raises:
        ConfigError: for an encoding that takes whole coordinates only.
    """

    def __init__(self, encoding: PositionEncoding, amount: float = 0.5) -> None:
        super().__init__()
        if not encoding.continuous:
            raise ConfigError(
                f"{type(encoding).__name__} cannot be jittered: it looks places up in a table, "
                "which takes whole coordinates only"
            )
        if not amount > 0:
            raise ConfigError(f"jitter needs an amount above 0, got {amount}")
        self.encoding, self.amount = encoding, amount
        self.relative, self.per_block = encoding.relative, encoding.per_block
        self.gives, self.policies = encoding.gives, encoding.policies

    def perturb(self, at: Positions) -> Callable[[Positions], Positions]:
        def moved(where: Positions) -> Positions:
            noise = torch.empty_like(where.coords).uniform_(-self.amount, self.amount)
            return Positions(where.coords + noise, where.extent, where.prefix)

        return moved

    def token(self, at: Positions) -> Tensor | None:
        return self.encoding.token(at)

    def angle(self, at: Positions) -> Tensor | None:
        self.encoding.policy = self.policy  # rotary policies act on the frequencies
        return self.encoding.angle(at)

    def bias(self, q: Positions, k: Positions):
        return self.encoding.bias(q, k)

    def reset_parameters(self) -> None:
        self.encoding.reset_parameters()

    def extra_repr(self) -> str:
        return f"amount={self.amount:g}"
