"""The range of a number among the settings, declared with its type: `lr: Positive`, `heads: Count | None`.

`spec.Settings` refuses what lies outside when it is made, in whatever way a value came; so NaN and infinity, a switch
or a text in place of a number are refused too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

from .errors import SettingError

INT32 = 2**31 - 1


class Range(NamedTuple):
    """Numbers from `low` to `high`; `above` and `below`: without `low`, without `high` itself."""

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        high = math.inf if self.high is None else self.high
        inside = (self.low < number if self.above else self.low <= number) and (
            number < high if self.below else number <= high
        )
        return inside and math.isfinite(number)

    def __str__(self) -> str:
        if self.high is None or self.high == INT32:
            return f"above {self.low}" if self.above else f"at least {self.low}"
        return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"


Count = Annotated[int, Range(1, INT32)]
Natural = Annotated[int, Range(0, INT32)]
Depth = Annotated[int, Range(0, 10_000)]
Processes = Annotated[int, Range(0, 1024)]
Threads = Annotated[int, Range(0, 4096)]
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Rate = Annotated[float, Range(0, 1, below=True)]  # something is left
Share = Annotated[float, Range(0, 1, above=True)]  # something is taken
Part = Annotated[float, Range(0, 1, above=True, below=True)]  # both
Probability = Annotated[float, Range(0, 1)]


class Number(NamedTuple):
    """What a field may hold: a number, or a tuple of `length`; None where it is optional."""

    kind: type
    range: Range
    length: int | None = None
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        """Refuse a value, or a number in a tuple of them.

        Raises:
            SettingError: naming the setting, what it must be and what came.
        """
        if value is None and self.optional:
            return
        values = [value] if self.length is None else list(value) if isinstance(value, tuple | list) else []
        if len(values) != (self.length or 1):
            raise SettingError(name, f" must be {self.length} numbers, {self.range}, got {value!r}")
        for given in values:
            number = _number(given)
            if number is None or (self.kind is int and isinstance(number, float)):
                raise SettingError(name, f" must be of type {self.kind.__name__}, {self.range}, got {given!r}")
            if not self.range.holds(number):
                much = f"at most {INT32}" if self.range.high == INT32 and number > INT32 else self.range
                finite = "" if math.isfinite(number) else " and finite"
                raise SettingError(name, f" must be {much}{finite}, got {number}")


def _number(value: object) -> int | float | None:
    """A number of Python or numpy; None where it is none."""
    if isinstance(value, Integral):
        return None if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, Real) else None


def check_numbers(ranges: Mapping[str, object], given: Mapping[str, object], several: Collection[str] = ()) -> None:
    """Refuse arguments outside their ranges; None is a default.

    Args:
        ranges: argument -> a type above.
        given: argument -> its value; names without a range are passed over.
        several: arguments that may be a sequence, each number of which is in the range.

    Raises:
        SettingError: naming the argument, what it must be and what came.
    """
    for name, value in given.items():
        if name in ranges and value is not None and (number := _range(ranges[name])) is not None:
            many = value if name in several and isinstance(value, Sequence) and not isinstance(value, str) else [value]
            for one in many:
                number.check(name, one)


def numbers_of(config: type) -> dict[str, Number]:
    """Field -> the numbers that it may hold, of the fields that declare a range."""
    found = {name: _range(hint) for name, hint in get_type_hints(config, include_extras=True).items()}
    hints = get_type_hints(config)
    return {
        name: number._replace(optional=type(None) in get_args(hints[name]))
        for name, number in found.items()
        if number is not None
    }


def _range(hint: object) -> Number | None:
    """The first range in a type such as `Count | None` or `tuple[Rate, Rate]`."""
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    if ranges:
        return Number(get_args(hint)[0], ranges[0])
    number = next((number for part in get_args(hint) if (number := _range(part)) is not None), None)
    return number._replace(length=len(get_args(hint))) if number and get_origin(hint) is tuple else number
