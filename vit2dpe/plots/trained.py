"""Pictures of the encodings of a model, as trained: what they do now, at its own grid or at another one.

What is drawn is what the model computes there: of a Swin the windows of each stage, under a policy the places, the
frequencies or the resized table that it gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ..encodings import ENCODINGS, Builder, Cycle, PositionEncoding, named_encodings, terms
from ..errors import ConfigError, unknown
from ..models.layers import PatchEmbed
from ..models.swin.stage import SwinStage
from ..resolution.apply import position_groups, use_policy
from .encodings import Panel, figure_of, panels_of
from .figures import choose_blocks, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Grid = tuple[int, ...]


class Placed(NamedTuple):
    """An encoding of a model: its dotted name, the grid or window it was trained on, and the one it is drawn at."""

    name: str
    encoding: PositionEncoding
    trained: Grid
    drawn: Grid
    kind: str  # grid or window


def draw(model: nn.Module, names: Sequence[str] = (), grid: Grid | None = None, *, policy: str = "default") -> Figure:
    """A figure with a row for each encoding of a model and for each term of a sum.

    Of encodings that every block owns, up to four blocks are drawn, evenly spaced, the first and the last among them.

    Args:
        model: one of ours, in whatever mode; it is left as it is.
        names: which of its encodings: words (rope), or modules (blocks.3, decoder_position), of which every block is
            drawn; default all.
        grid: of patches, rows before columns, or of tokens; default the one it was trained on. Windows of a Swin are
            those that it has at this grid.
        policy: what encodings do at this grid, as for `vit2dpe.use_policy`.

    Raises:
        ConfigError: for a model without encodings, names it does not have, a grid of another number of axes, and a
            policy that its encodings cannot take.
    """
    _check(model)
    with use_policy(model, policy):
        rows = [row for one in _chosen(placed(model, grid), names) for row in _rows(one, policy)]
    return figure_of(rows)


def save(
    model: nn.Module,
    path: str | Path,
    names: Sequence[str] = (),
    grid: Grid | None = None,
    *,
    policy: str = "default",
) -> Path:
    """Draw into a file; its suffix selects the format (.png, .svg, .pdf); arguments as for `draw`."""
    return save_figure(draw(model, names, grid, policy=policy), path)


def grid_at(model: nn.Module, size: tuple[int, int]) -> Grid:
    """The patches of a model where its images have this size, rows before columns.

    Raises:
        ConfigError: for a model of text, and a size that patches do not divide.
    """
    _check(model)
    patches = getattr(getattr(model, "encoder", model), "patch_embed", None)
    if not isinstance(patches, PatchEmbed):
        raise ConfigError(
            f"a size is that of an image, this {type(model).__name__} reads tokens: give a grid, such as 64"
        )
    return patches.grid(*size)


def _check(model: nn.Module) -> None:
    if not named_encodings(model):
        hint = "; vit2dpe.from_timm makes one of it" if type(model).__module__.startswith("timm.") else ""
        raise ConfigError(f"this {type(model).__name__} has no encoding of this library{hint}")


def placed(model: nn.Module, grid: Grid | None = None) -> list[Placed]:
    """Every encoding of a model that does something, a sum as one; windows are those of the policy that holds."""
    extents: dict[PositionEncoding, tuple[Grid, Grid, str]] = {}
    for _, part, trained in position_groups(model):
        drawn = tuple(grid or trained)
        if isinstance(part, SwinStage):
            drawn = part.window_at(part.train_grid if grid is None else _grid_of(model, part, grid))
        if len(drawn) != len(trained):
            wanted = {1: "of tokens, such as 64", 2: "of rows and columns, such as 14x14"}.get(
                len(trained), "as it was"
            )
            raise ConfigError(f"this {type(model).__name__} has a grid {wanted}: got {'x'.join(map(str, drawn))}")
        kind = "window" if isinstance(part, SwinStage) else "grid"
        extents |= {e: (trained, drawn, kind) for e in part.modules() if isinstance(e, PositionEncoding)}
    every = named_encodings(model)
    whole = [name for name in every if not any(name.startswith(f"{other}.") for other in every)]
    return [Placed(name, every[name], *extents[every[name]]) for name in whole if every[name].gives]


def _grid_of(model: nn.Module, stage: SwinStage, grid: Grid) -> tuple[int, int]:
    """The grid that a stage has where the image has this one: half of it, rounded up, for each stage before."""
    before = [module for module in model.modules() if isinstance(module, SwinStage)].index(stage)
    return -(-grid[0] // 2**before), -(-grid[1] // 2**before)


def _chosen(found: list[Placed], names: Sequence[str]) -> list[Placed]:
    """Those that are named, each with the terms of its sum that are; else all, of many blocks a few."""
    if not found:
        raise ConfigError("the encoding of this model is none: attention sees a set of tokens, in no order")
    if not names:
        of_kind: dict[str, list[str]] = {}
        for one in found:
            of_kind.setdefault(re.sub(r"\d+", "#", one.name), []).append(one.name)
        drawn = [name for same in of_kind.values() for name in choose_blocks(same)]
        return [one for one in found if one.name in drawn]
    parts = [".".join(one.name.split(".")[: i + 1]) for one in found for i in range(one.name.count(".") + 1)]
    words = [word_of(term) for one in found for term in terms(one.encoding) if term.gives]
    chosen: list[Placed] = []
    for name in names:
        if name in parts:
            chosen += [one for one in found if f"{one.name}.".startswith(f"{name}.")]
            continue
        for word in (part.partition("(")[0].strip() for part in name.split("+")):
            if word not in words:
                raise unknown("encoding of this model", word, dict.fromkeys([*words, *parts]))
            terms_of = [
                Placed(one.name, term, *one[2:])
                for one in found
                for term in terms(one.encoding)
                if word_of(term) == word
            ]
            chosen += _chosen(terms_of, ())
    return chosen


def word_of(encoding: PositionEncoding) -> str:
    """The name in `ENCODINGS`; of an encoding that is not there, its class."""
    for word, make in ENCODINGS.items():
        if isinstance(make, Builder) and make.encoding is type(encoding):
            return word
    return type(encoding).__name__


def _rows(one: Placed, policy: str) -> Iterator[tuple[str, list[Panel]]]:
    def show(grid: Grid) -> str:
        return "x".join(map(str, grid))

    at = f"{one.kind} {show(one.drawn)}"
    if one.drawn != one.trained or policy != "default":
        at = f"{one.kind} trained at {show(one.trained)}, drawn at {show(one.drawn)}, policy {policy}"
    if isinstance(one.encoding, Cycle):  # of different blocks, whose sum is nobody's
        for term in terms(one.encoding):
            yield from _rows(one._replace(encoding=term), policy)
        return
    each = [(f"{one.name}: {word_of(term)}, {at}", term) for term in terms(one.encoding) if term.gives]
    summed = "+".join(word_of(term) for _, term in each)
    yield from panels_of(each, one.drawn, f"{one.name}: {summed}, summed, {at}")
