"""`Jitter`: any encoding, its places moved a little at random in training.

    p' = p + ε,    ε uniform in ±amount patches, for each token and axis, drawn once a forward

A place of a table moves no farther than half a patch beyond the outermost centres, to the edge of the image; with
amounts up to 1/2 none would. Out there a table has its outermost entries (`between.py`).

Source: ComRoPE, arXiv 2506.03737 (coordinates jittered by half a patch; measured there to help every encoding beyond
the training size). How ours differs: a wrapper, so that it serves any encoding that takes fractional places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions
from ..signal import Signal
from .base import PositionEncoding, terms


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
                f"{type(encoding).__name__} cannot be jittered: it takes whole coordinates only (`continuous` is off)"
            )
        if not amount > 0:
            raise ConfigError(f"jitter needs an amount above 0, got {amount}")
        self.encoding, self.amount = encoding, amount
        self.relative, self.per_block = encoding.relative, encoding.per_block
        self.gives, self.policies = encoding.gives, encoding.policies
        self.bounded = any(part.resizes for part in terms(encoding))  # has a table, which ends

    def perturb(self, at: Positions) -> Callable[[Positions], Positions]:
        def draw(coords: Tensor) -> Tensor:
            return torch.empty_like(coords).uniform_(-self.amount, self.amount)

        drawn = draw(at.coords)  # once: keys that are the queries' places are moved with them

        def moved(where: Positions) -> Positions:
            coords = where.coords + (drawn if where.coords.shape == drawn.shape else draw(where.coords))
            edges: list[float] = [] if where.by_sample() else [size - 0.5 for size in where.span]
            if self.bounded:
                most = coords.new_tensor(edges) if edges else (where.spans() - 0.5).to(coords.device, coords.dtype)
                coords = coords.clamp(min=-0.5).minimum(most)
            made = where.moved(coords)
            if edges and (self.bounded or where.on_grid):  # then nobody need look where they went
                far = 0.5 if self.bounded else self.amount
                made.assume([-far] * where.axes, [edge - 0.5 + far for edge in edges])
            return made

        return moved

    def _signal(self, q: Positions, k: Positions) -> Signal:
        temperature = Signal(temperature=self._temperature(k))
        if self.training:
            move, same = self.perturb(q), q is k
            q = move(q)
            k = q if same else move(k)
        return temperature.plus(self.encoding(q, k))

    def reset_parameters(self) -> None:
        self.encoding.reset_parameters()

    def extra_repr(self) -> str:
        return f"amount={self.amount:g}"
