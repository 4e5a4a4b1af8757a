"""`lookhere`: heads that look one way, with a penalty that grows with distance.

    bias_h(q, k) = -s_g s_l s_h ‖q - k‖₂   where k lies in head h's field of view from q, else "not seen"

A directed head sees an angle of `view` degrees, its edges and the query itself included, in a direction of its own.
The slope falls with depth, s_l from 1.5 in the first block to 0.5 in the last; s_h is 1 for directed heads, and for
those that see everything 1/2, 1/8, 1/32, 1/128.

Source: LookHere, arXiv 2405.13985; GreenCUBIC/lookhere, `pape/lookhere.py`.

How ours differs: any number of heads (theirs: 6, 12, 16): a third of them sees everything, directions are spread
evenly over the others, from "up" on (for 45 degrees, half a step on, as theirs); any places, no square root of a
count; nothing is kept in buffers (theirs: 4.8 GB at 1,024 px), what all blocks share is built once a forward; "not
seen" is -1e9 times the slope, which no softmax tells from minus infinity, and which leaves a row that sees nothing
finite: where a mask hides all that a query sees, it gets the mean of the keys that are left, as under theirs, the
largest negative bfloat16; minus infinity would give NaN. In float64, which tells logits apart at -1e9, and in float16,
where `attend` moves the row to 0, these keys are weighed by their contents. Prefix tokens are seen by all and
see all.

Limits: one axis (before, behind) or two.
"""

from __future__ import annotations

import math

from ..errors import ConfigError
from ..positions import Positions
from ..signal import Distance
from .base import PositionEncoding


class LookHere(PositionEncoding):
    """Directed distance bias; nothing learned, nothing stored. Each block has its own slope.

    Args:
        heads: H.
        axes: 1 or 2.
        view: the angle a directed head sees, in degrees: 180, 90 or 45 in the paper.
        slope: s_g, the global slope.
        block, depth: which block of how many; None is a middle one (s_l = 1).
    """

    relative = True
    per_block = True
    block_numbers = ("slope_here",)
    gives = frozenset({"bias"})
    policies = ("extrapolate", "interpolate")

    def __init__(
        self,
        heads: int,
        *,
        axes: int = 2,
        view: float = 90.0,
        slope: float = 1.0,
        block: int | None = None,
        depth: int = 1,
    ) -> None:
        super().__init__()
        if axes not in (1, 2):
            raise ConfigError(f"lookhere has directions on 1 or 2 axes, got axes={axes}")
        if heads < 1 or not 0 < view <= 360 or not slope > 0:
            raise ConfigError(f"lookhere needs heads, 0 < view <= 360 and slope > 0: got {heads}, {view} and {slope}")
        self.heads, self.axes, self.view, self.slope = heads, axes, view, slope
        self.slope_here, self._any_block = slope, block is None
        if block is not None:
            self._slope_of(block, depth)

    def set_block(self, block: int, depth: int) -> None:
        """The slope of that block, unless it was built for one."""
        if self._any_block:
            self._slope_of(block, depth)

    def _slope_of(self, block: int, depth: int) -> None:
        self.slope_here = self.slope * (1.5 - (0.5 if depth == 1 else block / (depth - 1)))

    @property
    def wide_heads(self) -> int:
        """How many heads see everything; they come last."""
        return max(1, round(self.heads / 3))

    def bias(self, q: Positions, k: Positions) -> Distance:
        if q.axes != self.axes:
            raise ValueError(f"this lookhere was built for {self.axes} axes, the positions have {q.axes}")
        directions = tuple(self._directions())
        wide = [2.0 ** -(1 + 6 * i / max(1, self.wide_heads - 1)) for i in range(self.wide_heads)]
        slopes = (*[1.0] * len(directions), *wide)
        return Distance(q, k, slopes, directions, math.cos(math.radians(self.view / 2)), self.slope_here, self.dtype)

    def _directions(self) -> list[tuple[float, ...]]:
        """Unit vectors (row, column) of the directed heads, clockwise from "up" (row -1)."""
        count = self.heads - self.wide_heads
        if self.axes == 1:
            return [(-1.0,) if i % 2 == 0 else (1.0,) for i in range(count)]
        start = math.pi / count if count and self.view < 90 else 0.0
        turns = [start + 2 * math.pi * i / count for i in range(count)]
        return [(-math.cos(turn), math.sin(turn)) for turn in turns]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, axes={self.axes}, view={self.view:g}, slope={self.slope_here:g}"
