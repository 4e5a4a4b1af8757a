"""Every encoding by name: `build("sincos+rope(base=10)", dims)`.

A name is one line in `ENCODINGS`. That line makes the encoding known to every model, to the study and to the
contract tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial, reduce
from importlib.metadata import entry_points
from operator import add
from typing import Any

from ..errors import ConfigError, unknown
from ..spec import Plain, Term, check_option, parse_terms, read_terms, split_blocks
from .alibi import Alibi
from .along import read_axes
from .base import NoPosition, PositionEncoding
from .conventions import filled
from .decomposed import Decomposed
from .factorized import Factorized
from .fire import Fire
from .fourier import Fourier
from .irpe import IRPE
from .kerple import Kerple
from .learned import LearnedTable
from .logcpb import LogCPB
from .lookhere import LookHere
from .relative import RelativeBias
from .rope import AxialRoPE
from .rope_dinov3 import CentredRoPE
from .rope_golden import GoldenRoPE
from .rope_mixed import MixedRoPE
from .shaw import Shaw
from .sincos import SinCos
from .t5 import T5Bias
from .windowed import WindowedTable

GROUP = __name__.rpartition(".")[0]  # vit2dpe.encodings, of entry points: word = "module:function from Dims, or class"


@dataclass(frozen=True)
class Dims:
    """Sizes of a model, from which an encoding is built.

    Args:
        width: D, channels of a token.
        heads: H.
        grid: the sizes of the training grid.
        block, depth: the block an encoding is built for (None: shared by all) and how many there are.
    """

    width: int
    heads: int
    grid: tuple[int, ...]
    block: int | None = None
    depth: int = 1

    @property
    def axes(self) -> int:
        return len(self.grid)

    @property
    def head_dim(self) -> int:
        if self.width % self.heads:
            raise ConfigError(f"the width must be a multiple of the heads: got {self.width} and {self.heads}")
        return self.width // self.heads


@dataclass(frozen=True)
class Builder:
    """An encoding's class and the arguments that come from the model; options come from its specification.

    Each has an option more, `axes`: those of the grid that it reads (along.py).
    With `presets` there is an option more, `preset`: the options of a released convention (presets.py).
    """

    encoding: type[PositionEncoding]
    arguments: Callable[[Dims], dict[str, Any]]
    presets: bool = False

    def __call__(self, dims: Dims, **options: Any) -> PositionEncoding:
        if "axes" in options:
            along = read_axes(options.pop("axes"), dims.axes)
            made = self(replace(dims, grid=along.of(dims.grid)), **options)
            made.along = along
            return made
        if self.presets and "preset" in options:
            word, options = filled(options.pop("preset"), options, dims.axes, dims.head_dim)
            return ENCODINGS[word](dims, **options)
        given = self.arguments(dims)
        known = [name for name in inspect.signature(self.encoding).parameters if name not in given]
        known += ["preset"] if self.presets else []
        for name in options:
            if name not in known:
                raise unknown(f"option of {self.encoding.__name__}", name, known or ["(it takes none)"])
            check_option(self.encoding, name, options[name])
        return self.encoding(**given, **options)


ENCODINGS: dict[str, Callable[..., PositionEncoding]] = {
    "none": Builder(NoPosition, lambda d: {}),
    "learned": Builder(LearnedTable, lambda d: {"dim": d.width, "grid": d.grid}),
    "windowed": Builder(WindowedTable, lambda d: {"dim": d.width, "grid": d.grid}),
    "sincos": Builder(SinCos, lambda d: {"dim": d.width, "axes": d.axes}),
    "factorized": Builder(Factorized, lambda d: {"dim": d.width, "grid": d.grid}),
    "fourier": Builder(Fourier, lambda d: {"dim": d.width, "axes": d.axes}),
    "relative": Builder(RelativeBias, lambda d: {"heads": d.heads, "grid": d.grid}),
    "shaw": Builder(Shaw, lambda d: {"head_dim": d.head_dim, "heads": d.heads, "axes": d.axes}),
    "irpe": Builder(IRPE, lambda d: {"head_dim": d.head_dim, "heads": d.heads, "axes": d.axes}),
    "decomposed": Builder(Decomposed, lambda d: {"head_dim": d.head_dim, "heads": d.heads, "grid": d.grid}),
    "logcpb": Builder(LogCPB, lambda d: {"heads": d.heads, "grid": d.grid}),
    "t5": Builder(T5Bias, lambda d: {"heads": d.heads, "axes": d.axes}),
    "alibi": Builder(Alibi, lambda d: {"heads": d.heads, "axes": d.axes}),
    "kerple": Builder(Kerple, lambda d: {"heads": d.heads}),
    "lookhere": Builder(LookHere, lambda d: {"heads": d.heads, "axes": d.axes, "block": d.block, "depth": d.depth}),
    "fire": Builder(Fire, lambda d: {"heads": d.heads, "grid": d.grid}),
    "rope": Builder(AxialRoPE, lambda d: {"head_dim": d.head_dim, "axes": d.axes, "heads": d.heads}, True),
    "rope_mixed": Builder(MixedRoPE, lambda d: {"head_dim": d.head_dim, "heads": d.heads, "axes": d.axes}),
    "rope_golden": Builder(GoldenRoPE, lambda d: {"head_dim": d.head_dim, "heads": d.heads, "grid": d.grid}),
    "rope_dinov3": Builder(CentredRoPE, lambda d: {"head_dim": d.head_dim, "axes": d.axes, "heads": d.heads}),
}


def build(spec: str, dims: Dims) -> PositionEncoding:
    """The encoding of a specification: names joined by `+`, options in parentheses: `sincos+rope(base=10)`.

    Of words by block, `rope/none`, it is that of the block that `dims` names.

    Raises:
        ConfigError: for a specification that cannot be read, an unknown name or option, or sizes it cannot take; for
            words by block where `dims` names none.
    """
    words = split_blocks(spec)
    if len(words) > 1 and dims.block is None:
        raise ConfigError(
            f"{spec!r} is an encoding for each block of a model in turn: give a model, or one of its words"
        )
    spec = words[(dims.block or 0) % len(words)]
    return reduce(add, (ENCODINGS[name](dims, **options) for name, options in parse(spec)))


def parse_blocks(spec: str) -> list[list[Term]]:
    """`parse` of each word that the blocks of a model follow in turn, `rope/rope/none`; most have one."""
    return [parse(word) for word in split_blocks(spec)]


def parse(spec: str) -> list[Term]:
    """[(name, options), ...] of an encoding's specification; every name is one of `ENCODINGS`.

    A name that is not there is looked for among the entry points of installed packages.
    """
    if all(name in ENCODINGS or from_entry_point(name) for name, _ in read_terms(spec)):
        return parse_terms(spec, "encoding", ENCODINGS)
    declared = [name for name in entry_points(group=GROUP).names if name not in ENCODINGS]
    try:
        return parse_terms(spec, "encoding", [*ENCODINGS, *declared])
    except ConfigError as error:
        raise ConfigError(f"{error}; for one of your own: --import file.py") from None


def from_entry_point(word: str) -> bool:
    """Whether an installed package declares this word; it is then known.

    What it names is a function from `Dims`, or a class, whose arguments are found by their names.
    """
    for point in entry_points(group=GROUP, name=word):
        try:
            found = point.load()
        except Exception as error:  # whatever the code of others raises
            raise ConfigError(f"encoding {word!r} of {point.value} failed: {type(error).__name__}: {error}") from error
        if word not in ENCODINGS:
            ENCODINGS[word] = partial(of_class, found) if isinstance(found, type) else found
        return True
    return False


def of_class(kind: type[PositionEncoding], dims: Dims, **options: Plain) -> PositionEncoding:
    """An encoding of a class whose other arguments are found by their names."""
    return kind(**arguments_of(kind, dims, options), **options)


def arguments_of(encoding: type, dims: Dims, given: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of a class that `dims` has, by their names, without those that are given."""
    known: dict[str, Any] = {"dims": dims, "dim": dims.width, "width": dims.width, "heads": dims.heads}
    known |= {"head_dim": dims.head_dim, "axes": dims.axes, "grid": dims.grid, "block": dims.block, "depth": dims.depth}
    parameters = inspect.signature(encoding).parameters
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if name not in (*known, *given) and parameter.default is parameter.empty and parameter.kind not in starred:
            raise ConfigError(
                f"{encoding.__name__} wants {name!r}, which no model knows: give a function that builds it, "
                f"lambda dims: {encoding.__name__}(...); known are {', '.join(known)}"
            )
    return {name: known[name] for name in parameters if name in known and name not in given}
