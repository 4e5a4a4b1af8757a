"""Policies of rotary frequencies: `ntk`, `yarn`, `llama3`, `longrope`; their formulas are in `policies.py`.

Each scales an axis by its own growth. A frequency of 0 stays 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..encodings.rope import slowed
from ..errors import ConfigError
from ..grids import Span
from ..positions import numbers
from .scaled import Scaled, growth_of, is_one, powers_of


@dataclass(frozen=True)
class NTK(Scaled):
    """Low frequencies slowed by the scale, the highest kept; an axis that shrank keeps all.

    For a geometric bank it is base -> base · s^(c / (c - 2)) with c channels on that axis.
    """

    name: str = "ntk"

    def rescale(self, frequencies: Tensor, extent: Span) -> Tensor:
        grown = self.growth(extent)
        if all(is_one(s) for s in grown):
            return frequencies
        size = frequencies.norm(dim=0)  # (1|H, Dh/2)
        top = size.amax(-1, keepdim=True).clamp(min=1e-30)  # of heads that stand still
        low = torch.where(size > 0, size, top).amin(-1, keepdim=True)
        span = (top / low).log()
        depth = torch.where(span > 0, (top / size.clamp(min=low)).log() / span.clamp(min=1e-12), 0.0)
        return torch.stack([w * s ** (-depth) for w, s in zip(frequencies, grown, strict=True)])


@dataclass(frozen=True)
class YaRN(Scaled):
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
        super().__post_init__()
        fast, slow = self.betas
        if not fast > slow > 0:
            raise ConfigError(f"yarn needs beta_fast > beta_slow > 0, got {fast} and {slow}")

    @property
    def betas(self) -> tuple[float, float]:
        fast, slow = (32.0, 1.0) if len(self.train) == 1 else (1.0, 0.25)
        return self.beta_fast or fast, self.beta_slow or slow

    def rescale(self, frequencies: Tensor, extent: Span) -> Tensor:
        rows, (fast, slow) = [], self.betas
        for w, s, length in zip(frequencies, self.growth(extent), self.train, strict=True):
            turns = (w.abs() * length / (2 * math.pi)).clamp(min=1e-30)
            keep = (turns / slow).log() / math.log(fast / slow)
            rows.append(w if is_one(s) else slowed(w, s, keep))
        return torch.stack(rows)


@dataclass(frozen=True)
class Llama3(Scaled):
    """Frequencies that turn often over the training extent kept, those that turn seldom divided by s, in between a mean
    of both that is linear in the turns.

    A model whose config says rope_type="llama3" is scaled so at every length: that is `rope(llama3=...)`, which
    `from_transformers` reads.

    Args:
        high_freq_factor, low_freq_factor: turns over the training extent above which a frequency is kept and below
            which it is divided by s. Default on a line: 4 and 1, those of Llama 3.1; else 1 and 1/4, see `yarn`.
    """

    like: ClassVar[str] = "yarn"
    name: str = "llama3"
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.factors
        if not high > low > 0:
            raise ConfigError(f"llama3 needs high_freq_factor > low_freq_factor > 0, got {high} and {low}")

    @property
    def factors(self) -> tuple[float, float]:
        low, high = (1.0, 4.0) if len(self.train) == 1 else (0.25, 1.0)
        return self.low_freq_factor or low, self.high_freq_factor or high

    def rescale(self, frequencies: Tensor, extent: Span) -> Tensor:
        rows, (low, high) = [], self.factors
        for w, s, length in zip(frequencies, self.growth(extent), self.train, strict=True):
            keep = (w.abs() * (length / (2 * math.pi)) - low) / (high - low)
            rows.append(w if is_one(s) else slowed(w, s, keep))
        return torch.stack(rows)


@dataclass(frozen=True)
class LongRoPE(Scaled):
    """Frequencies divided by a factor for each pair of channels, on an axis that is longer than in training.

    Its temperature (`attention_factor` in transformers) is that of the word "log", where the factors are those of the
    length that a model runs at.

    Args:
        long_factor: Dh/2 numbers, in the order of the pairs, as a config has them under rope_parameters; a power makes
            them factor ^ power.
        short_factor: likewise, of an axis that is not longer; default 1.
    """

    like: ClassVar[str] = "yarn"
    name: str = "longrope"
    long_factor: tuple[float, ...] | None = None
    short_factor: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("long_factor", "short_factor"):
            given = getattr(self, name)
            if given is None and name == "short_factor":
                continue
            if given is None or not all(isinstance(x, int | float) and 0 < x < math.inf for x in given):
                raise ConfigError(
                    f"longrope needs {name}=(1.0, 1.05, ...), a factor above 0 for each pair of channels of a head, as "
                    f"the rope_parameters in a model's config.json have it; got {given}"
                )

    def rescale(self, frequencies: Tensor, extent: Span) -> Tensor:
        rows = []
        grown = growth_of(self.train, extent)
        for w, s, power in zip(frequencies, grown, powers_of(self.power, len(self.train)), strict=True):
            short, long = (self._factor(each, w, power) for each in (self.short_factor, self.long_factor))
            by = torch.where(s > 1, long, short) if isinstance(s, Tensor) else long if s > 1 else short
            rows.append(w / by)
        return torch.stack(rows)

    def _factor(self, given: tuple[float, ...] | None, w: Tensor, power: float) -> Tensor:
        """(Dh/2,)"""
        pairs = w.shape[-1]
        if given is None:
            return w.new_ones(pairs)
        if len(given) != pairs:
            raise ConfigError(f"longrope needs a factor for each of {pairs} pairs of channels, got {len(given)}")
        return numbers([x**power for x in given], w.device).to(w.dtype)
