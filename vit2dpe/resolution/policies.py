"""Resolution policies: what an encoding does at an extent it was not trained at.

A policy scales each axis on its own; s = extent / training extent of an axis:

    extrapolate   coordinates as they are                        formulas
    interpolate   coordinates scaled to the training extent      formulas (arXiv 2306.15595)
    ntk           rotary frequencies w_i -> w_i s^(-t_i)         rotary   ("NTK-aware" base change)
    yarn          between extrapolate and interpolate by         rotary   (arXiv 2309.00071)
                  how often a frequency turns over the training extent
    resize        the table is resized to the extent             tables

t_i runs from 0 at the highest frequency to 1 at the lowest. With a length temperature, logits are multiplied by
ln N / ln N_train (arXiv 2202.12172), so that attention keeps its peak among more keys; N is the product of the extent,
prefix tokens not counted. At scale 1 no policy changes a bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, unknown
from ..positions import Positions, numbers

Extent = tuple[int, ...]


@dataclass(frozen=True)
class Keep:
    """`extrapolate` for formulas, `resize` for tables: what an encoding does by itself.

    Args:
        train: the training extent.
        name: as it is specified.
    """

    train: Extent
    name: str = "extrapolate"

    def place(self, at: Positions) -> Positions:
        return at

    def rescale(self, frequencies: Tensor, extent: Extent) -> Tensor:
        return frequencies


_SHIFT = {"half_pixel": 0.5, "corner": 0.0, "one": 1.0}


@dataclass(frozen=True)
class Interpolate(Keep):
    """Places scaled into the training extent.

    Args:
        align: "half_pixel" keeps the outer edges of the grid in place: (p + 1/2) / s - 1/2; "corner" keeps the first
            place: p / s, as EVA-02 does; "one" counts places from 1: (p + 1) / s - 1, as the Perception Encoder does.
    """

    name: str = "interpolate"
    align: str = "half_pixel"

    def __post_init__(self) -> None:
        if self.align not in _SHIFT:
            raise unknown("align of interpolate", self.align, _SHIFT)

    def place(self, at: Positions) -> Positions:
        if not torch.compiler.is_compiling() and at.extent == self.train:
            return at
        return at.memoize(self, lambda: self._scaled(at))  # the same object for every block of a forward

    def _scaled(self, at: Positions) -> Positions:
        ratio = numbers([t / e for t, e in zip(self.train, at.extent, strict=True)], at.coords.device)
        ratio, shift = ratio.to(at.coords.device, at.coords.dtype), _SHIFT[self.align]
        return Positions((at.coords + shift) * ratio - shift, self.train, at.prefix)


@dataclass(frozen=True)
class NTK(Keep):
    """Low frequencies slowed by the scale, the highest kept; an axis that shrank keeps all.

    For a geometric bank it is base -> base · s^(c / (c - 2)) with c channels on that axis.
    """

    name: str = "ntk"

    def rescale(self, frequencies: Tensor, extent: Extent) -> Tensor:
        grown = _growth(self.train, extent)
        if all(_is_one(s) for s in grown):
            return frequencies
        size = frequencies.norm(dim=0)  # (1|H, Dh/2)
        top = size.amax(-1, keepdim=True)
        low = torch.where(size > 0, size, top).amin(-1, keepdim=True)
        span = (top / low).log()
        depth = torch.where(span > 0, (top / size.clamp(min=low)).log() / span.clamp(min=1e-12), 0.0)
        return torch.stack([w * s ** (-depth) for w, s in zip(frequencies, grown, strict=True)])


@dataclass(frozen=True)
class YaRN(Keep):
    """Frequencies that turn often over the training extent kept, those that turn seldom interpolated.

    Args:
        beta_fast, beta_slow: turns over the training extent above which a frequency is kept and below which it is
            divided by s; in between, linear in the logarithm. Default on a line: 32 and 1, the paper's, tuned for
            text of thousands of tokens. On images no frequency turns 32 times, and those values would only
            interpolate; there the default is 1 and 1/4.
    """

    name: str = "yarn"
    beta_fast: float | None = None
    beta_slow: float | None = None

    def __post_init__(self) -> None:
        fast, slow = self.betas
        if not fast > slow > 0:
            raise ConfigError(f"yarn needs beta_fast > beta_slow > 0, got {fast} and {slow}")

    @property
    def betas(self) -> tuple[float, float]:
        fast, slow = (32.0, 1.0) if len(self.train) == 1 else (1.0, 0.25)
        return self.beta_fast or fast, self.beta_slow or slow

    def rescale(self, frequencies: Tensor, extent: Extent) -> Tensor:
        grown = _growth(self.train, extent)
        rows, (fast, slow) = [], self.betas
        for w, s, length in zip(frequencies, grown, self.train, strict=True):
            turns = (w.abs() * length / (2 * math.pi)).clamp(min=1e-30)
            keep = (turns / slow).log() / math.log(fast / slow)
            rows.append(w if _is_one(s) else w * (1 / s + (1 - 1 / s) * keep.clamp(0, 1)))
        return torch.stack(rows)


@dataclass(frozen=True)
class LogTemperature:
    """ln N / ln N_train."""

    train: Extent

    def __call__(self, extent: Extent) -> float | Tensor:
        if torch.compiler.is_compiling():
            return _traced(math.prod(extent)).log() / math.log(math.prod(self.train))
        return math.log(math.prod(extent)) / math.log(math.prod(self.train))


@dataclass(frozen=True)
class YaRNTemperature:
    """(0.1 ln s + 1)², s the growth of the side (the geometric mean over axes), as YaRN scales its logits."""

    train: Extent

    def __call__(self, extent: Extent) -> float | Tensor:
        if torch.compiler.is_compiling():
            growth = _traced(math.prod(extent)) / math.prod(self.train)
            return (0.1 / len(extent) * growth.clamp(min=1).log() + 1).square()
        s = (math.prod(extent) / math.prod(self.train)) ** (1 / len(extent))
        return (0.1 * math.log(s) + 1) ** 2 if s > 1 else 1.0


def _traced(number: int) -> Tensor:
    """While tracing, a size as a 0-d tensor: a Python float made of it would be a constant, and every size a graph."""
    return torch.full((), number, dtype=torch.float64)


def _growth(train: Extent, extent: Extent) -> list[float | Tensor]:
    if torch.compiler.is_compiling():
        return [(_traced(e) / t).clamp(min=1) for t, e in zip(train, extent, strict=True)]
    return [max(1.0, e / t) for t, e in zip(train, extent, strict=True)]


def _is_one(growth: float | Tensor) -> bool:
    """Known to be 1; a traced one is not known, and the formulas give the same then."""
    return not isinstance(growth, Tensor) and growth == 1


POLICIES = {"extrapolate": Keep, "resize": Keep, "interpolate": Interpolate, "ntk": NTK, "yarn": YaRN}
TEMPERATURES: dict[str, type[LogTemperature] | type[YaRNTemperature]] = {"log": LogTemperature, "yarn": YaRNTemperature}
WHY_NOT = {
    "extrapolate": "a table has no entries beyond the grid it was learned on",
    "resize": "it is a formula and has no table to resize",
    "interpolate": "it looks places up in a table, which takes whole coordinates only",
    "ntk": "it has no rotary frequencies",
    "yarn": "it has no rotary frequencies",
}
