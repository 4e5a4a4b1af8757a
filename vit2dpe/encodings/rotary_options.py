"""Numbers that options of rotary encodings take, checked: one of each axis, and what slows a bank of frequencies.

llama3=(f, low, high, L)   w where it turns at least `high` times over L tokens, w / f where at most `low` times, in
                           between a mean that is linear in the turns  (transformers, `_compute_llama3_parameters`)
factors=(f_0, f_1, ...)    w_k / f_k for pair k of a bank: what YaRN and LongRoPE leave a trained model with, the same
                           at every length (`_compute_yarn_parameters`, `_compute_longrope_parameters`)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError

Each = float | tuple[float, ...]  # one number, or one of each axis


def of_each(given: Each, axes: int, what: str, fits: Callable[[float], bool]) -> tuple[float, ...]:
    """One number of each axis."""
    each = given if isinstance(given, tuple) else (given,) * axes
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in each)
    if len(each) != axes or not numbers or not all(map(fits, each)):
        raise ConfigError(f"a rotary encoding needs {what}, one number or {axes}, one of each axis; got {given}")
    return each


def check_slowing(llama3: tuple[float, ...] | None, factors: tuple[float, ...] | None, counts: set[int]) -> None:
    """Refuse numbers that slow nothing; `counts` are the pairs of the banks."""
    if llama3 is not None and not (len(llama3) == 4 and _above_zero(llama3) and llama3[1] < llama3[2]):
        raise ConfigError(
            "llama3 is (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings), all above 0, "
            f"the low factor below the high one; got {llama3}"
        )
    if factors is not None and not (_above_zero(factors) and counts == {len(factors)}):
        pairs = " and ".join(map(str, sorted(counts)))
        raise ConfigError(
            f"factors are numbers above 0, one for each pair of a bank of {pairs}; got {len(factors)}: {factors}"
        )


def _above_zero(numbers: tuple[float, ...]) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in numbers)
