"""`rope_dinov3`: axial frequencies on coordinates that are centred and scaled to the grid; moved at random in training.

    angle = 2π c / period,    c_a = 2 (p_a + 1/2) / S_a - 1,    period_k = base^(k/K),    K = Dh / (2 d)

Source: DINOv3, arXiv 2508.10104, `layers/rope_position_encoding.py` (separate normalisation of the axes).

How ours differs: any number of axes; the random map is drawn once a forward, where the original draws once a
block. Pairs are (2i, 2i+1); the original's half-split ones are a permutation of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from ..positions import Positions, exact, float64_device
from .rope import AlongAxes, AxialAngles, SectionAngles
from .rotary_options import of_each
from .sections import Sections


class CentredRoPE(AlongAxes):
    """DINOv3's: angle = 2π c / period on coordinates c in (-1, 1), so a grid of any size spans the same angles.

        c_a = 2 (p_a + 1/2) / S_a - 1,    period_k = base^(k/K),    K = Dh / (2 d)

    In training places are moved at random, once a forward: c is multiplied by a factor shared by all axes and one of
    each axis, log-uniform in [1/rescale, rescale] and [1/jitter, jitter], after a shift of each axis, uniform in
    ±shift.

    Args:
        head_dim: Dh, even.
        axes: d.
        heads: H, for `order="head"`.
        base: ratio of the longest to the shortest period, one number or one of each axis.
        step: turns of the fastest pair in a unit of c, one number or one of each axis.
        sections, partial, zeros, order, bank: see `AxialRoPE`.
        rescale, jitter: at least 1; 1 is off. DINOv3's released models were trained with rescale 2 alone.
        shift: in units of c; 0 is off.
    """

    policies = ("interpolate",)  # what it does by itself: its coordinates are scaled to the grid

    def __init__(
        self,
        head_dim: int,
        *,
        axes: int = 2,
        heads: int | None = None,
        base: float | tuple[float, ...] = 100.0,
        step: float | tuple[float, ...] = 1.0,
        rescale: float = 2.0,
        jitter: float = 1.0,
        shift: float = 0.0,
        sections: tuple[int, ...] | None = None,
        partial: float = 1.0,
        zeros: int = 0,
        order: str = "axis",
        bank: str = "own",
    ) -> None:
        super().__init__()
        turns = of_each(step, axes, "step > 0", lambda step: step > 0)
        per_unit = tuple(2 * math.pi * turn for turn in turns)  # radians
        self.sections = Sections(head_dim, axes, base, per_unit, heads, sections, partial, zeros, order, bank)
        if rescale < 1 or jitter < 1 or shift < 0:
            raise ConfigError(
                f"rope_dinov3 needs rescale >= 1, jitter >= 1 and shift >= 0, got {rescale}, {jitter} and {shift}"
            )
        self.axes, self.turns = axes, turns
        self.rescale, self.jitter, self.shift = rescale, jitter, shift

    def measures_extent(self) -> bool:
        return True

    @property
    def even(self) -> bool:
        """Whether it is that of timm: no option of the frequencies but `base`."""
        return self.sections.even and set(self.turns) == {1.0}

    def angle(self, at: Positions) -> AxialAngles | SectionAngles:
        if at.axes != self.axes:
            raise ValueError(f"this rope was built for {self.axes} axes, the positions have {at.axes}")
        return super().angle(at.moved(_centred(at)))

    def perturb(self, at: Positions) -> Callable[[Positions], Positions] | None:
        if self.rescale == 1 and self.jitter == 1 and self.shift == 0:
            return None
        # Where the places are: a CUDA graph would repeat what the host has drawn.
        draw = torch.rand(2 * self.axes + 1, dtype=torch.float64, device=float64_device(at.coords.device)) * 2 - 1
        shift = self.shift * draw[: self.axes]
        factor = self.jitter ** draw[self.axes : -1] * self.rescale ** draw[-1]

        def moved(where: Positions) -> Positions:
            half = where.spans() / 2
            scale, offset = (
                t.to(where.coords.device, where.coords.dtype) for t in (factor, (factor * shift + 1) * half)
            )
            middle = half.to(where.coords.device, where.coords.dtype)
            # c' = factor (c + shift), written in patches: p + 1/2 = (c + 1) S / 2
            return where.moved((where.coords + 0.5 - middle) * scale + offset - 0.5)

        return moved

    def extra_repr(self) -> str:
        shown = replace(self.sections, step=self.turns)
        return f"{shown}, rescale={self.rescale:g}, jitter={self.jitter:g}, shift={self.shift:g}"


def _centred(at: Positions) -> Tensor:
    coords = exact(at.coords)
    return 2 * (coords + 0.5) / at.spans() - 1
