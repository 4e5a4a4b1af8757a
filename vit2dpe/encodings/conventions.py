"""What a preset of `rope` comes to in a model: its options, and how channels of the original stand in ours.

The rows are in presets.py. Pairs are (2i, 2i+1) here whatever the original has, rows before columns, and pairs that
stand still are behind the others: the same frequencies in another order of channels, which `channels_of` gives.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ConfigError, unknown
from ..spec import Plain
from .presets import PRESETS, REFUSED, Preset

AXES = ("index", "time", "rows", "columns", "length")
TIED = ("sections", "step", "zeros")  # options that belong to a head width


def preset_of(name: Plain) -> Preset:
    """The row of a name.

    Raises:
        ConfigError: for one that is not there, with the nearest, and one that no options say, with the reason.
    """
    if isinstance(name, str) and name in REFUSED:
        raise ConfigError(f"no options of rope are the convention of {name!r}: {REFUSED[name]}")
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown("preset of rope", str(name), PRESETS)
    return PRESETS[name]


def filled(name: Plain, given: Mapping[str, Plain], axes: int, head_dim: int) -> tuple[str, dict[str, Plain]]:
    """The word that a preset stands for, and its options; those given beside it win.

    Of a grid with fewer axes, those of index, time and length are left out: of one image they are 0 everywhere.

    Raises:
        ConfigError: for a preset of another head width or other axes.
    """
    row = preset_of(name)
    tied = [option for option in TIED if option in row.options]
    if row.head_dim not in (None, head_dim) and not any(option in given for option in tied):
        raise ConfigError(
            f"preset {name} is of heads {row.head_dim} wide, got {head_dim}: take a width and heads that give it, or "
            f"write {' and '.join(f'{option}=' for option in tied)} of your own beside it"
        )
    own = natural(row)
    kept = list(own)
    for axis in ("length", "index", "time"):
        if len(kept) > axes and axis in kept:
            kept.remove(axis)
    woven = row.options.get("bank") == "whole" or row.options.get("order") == "interleaved"
    if len(kept) != axes or (woven and kept != own):
        raise ConfigError(f"preset {name} has the axes {', '.join(own)}, and the grid has {axes}")
    where = [own.index(axis) for axis in kept]
    options = {
        option: tuple(value[i] for i in where) if isinstance(value, tuple) and len(value) == len(own) else value
        for option, value in row.options.items()
    }
    return row.word, options | dict(given)


def natural(row: Preset) -> list[str]:
    """The axes in our order."""
    return sorted(row.axes.split(), key=AXES.index)


def channels_of(name: str, head_dim: int) -> list[int]:
    """Of each of our channels of a head, the channel of the original: `q_ours = q[..., channels_of(name, Dh)]`.

    Raises:
        ConfigError: for a name that is not there, and a head width that the preset is not of.
    """
    row = preset_of(name)
    axes, theirs = natural(row), row.axes.split()
    _, options = filled(name, {}, len(axes), head_dim)
    given = options.get("sections")
    shares = [k for k in given if isinstance(k, int)] if isinstance(given, tuple) else []
    shares = shares or [head_dim // 2 // len(axes)] * len(axes)
    count, d = sum(shares), len(axes)
    if options.get("order") == "interleaved":
        pairs = [i - i % d + axes.index(theirs[i % d]) for i in range(count)]  # ours, in their order
        blocks = [count]
    else:
        first_of = {axis: sum(shares[:i]) for i, axis in enumerate(axes)}
        blocks = [shares[axes.index(axis)] for axis in theirs]
        pairs = [first_of[axis] + k for axis, size in zip(theirs, blocks, strict=True) for k in range(size)]
    if row.channels == "halves":
        blocks = [count]
    found, first = list(range(head_dim)), 0
    for size in blocks:
        for k in range(size):
            at = 2 * (first + k) if row.channels == "pairs" else 2 * first + k
            pair = pairs[first + k]
            found[2 * pair], found[2 * pair + 1] = at, at + (1 if row.channels == "pairs" else size)
        first += size
    return found
