"""Where tokens are: the only carrier of geometry in the project.

Coordinates are patch units, rows before columns, patch centres at integers. A token's place is data, so
the rule for every model is: *whatever is done to tokens is done to Positions*. Masking is `take`, a window
or a shift is a `take` with the permuted index, a decoding step is a `start`.

Legend: B batch, N tokens that have a place, d axes of the grid, P prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import register_dataclass

from .grids import Bounds, Extent, Places, between_places, check, each_axis, is_tracing, of_prefix, readable, taken
from .segments import Segments

__all__ = ["DISTANCES", "Positions", "distance", "exact", "float64_device", "is_tracing", "numbers", "offsets"]
T = TypeVar("T")


class Row(NamedTuple):
    """The segments of a packed row, and where the tokens of each kind of them are; see `packed.in_segments`."""

    segments: Segments
    places: tuple[Positions, ...]


@dataclass(frozen=True, eq=False)
class Positions:
    """Places of N tokens on a d-dimensional grid.

    Args:
        coords: (B|1, N, d) float32 or float64, patch units, rows first, patch centres at integers.
        extent: the d sizes of the grid the coordinates live on. Never inferred from N: after `take` a
            few tokens still live on the whole grid. Where samples have grids of their own, int64 (B, d) on the device
            of coords, or (S, d) of S images in a row; its values are not looked at.
        prefix: leading tokens that have no place (class token, registers). They have no row in `coords`. Of a row of
            images those of all lead it, as many of each, in the order of the images.
        on_grid: that all places are known to be whole numbers inside the extent, by how they were made. Others are
            looked at where a table is about to be read at them, once; on a GPU the host waits for that. In a graph,
            which looks at nothing, others are taken to be fractional.
        spacing: how far apart neighbours on this grid are, one number for each axis; () where it is 1. Coordinates
            stay in patches of the training grid, the extent counts places of this one: it covers `span`.
        valid: (B|1, N) bool, which places hold a token; None: all. Prefix tokens always are one.
        segment: (1, N) int64, for images in a row: of which one, a row of the extent, each place is.
        box: of extents by sample the largest size along each axis, where it is known; a table of all offsets is as
            large.
        row: of a packed row, where the tokens of its segments are; encodings are evaluated there.

    Raises:
        ValueError: if `coords` is not (B, N, d) in at least float32, `extent` does not name d sizes, or what is of each
            sample or place has another shape or type.
    """

    coords: Tensor
    extent: Extent
    prefix: int = 0
    on_grid: bool = False
    spacing: tuple[float, ...] = ()
    valid: Tensor | None = None
    segment: Tensor | None = None
    box: tuple[int, ...] = ()
    row: Row | None = None
    whole: bool = field(default=False, init=False, repr=False)  # made by `grid`: all places, row by row
    # Of scaled places: those that were scaled, and the ratio of their offsets, (d,) or (B|1, N|1, d) float64.
    source: tuple[Positions, Tensor] | None = field(default=None, init=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)  # see `memoize`

    def __post_init__(self) -> None:
        if not isinstance(self.coords, Tensor):
            return  # a tree of something else, while a pytree is mapped over
        if not isinstance(self.extent, Tensor):
            object.__setattr__(self, "extent", tuple(self.extent))
        # Half precision cannot tell place 257 from 258.
        right = self.coords.ndim == 3 and self.coords.dtype in (torch.float32, torch.float64)
        plain = not isinstance(self.extent, Tensor) and self.valid is None and self.segment is None
        if not (right and plain and self.coords.shape[-1] == len(self.extent)):
            check(self.coords, self.extent, self.valid, self.segment)

    @classmethod
    def grid(
        cls,
        extent: Sequence[int],
        device: torch.device | str | None = None,
        *,
        spacing: float | Sequence[float] | None = None,
        origin: float | Sequence[float] | None = None,
    ) -> Positions:
        """All places of a grid in row-major order: `grid((2, 3))` is (0,0) (0,1) (0,2) (1,0) (1,1) (1,2).

        Args:
            extent: how many places there are along each axis.
            spacing: the size of a patch in the world (metres, microns, seconds) over that of training, one number or
                one of each axis: 0.5 where pixels are half as large. Default 1.
            origin: the coordinate of the first place, in patches of training; default (spacing - 1) / 2, with which
                the outer edge of the grid is where that of training is, at -1/2.

        Raises:
            ValueError: for an axis without a place (not while compiling, where a size may not be known), and a spacing
                that is not above 0.
        """
        if spacing is not None or origin is not None:
            return cls._spaced(extent, device, spacing, origin)
        if not torch.compiler.is_compiling() and any(size < 1 for size in extent):
            raise ValueError(f"a grid needs at least one place along each axis, got {tuple(extent)}")
        axes: list[Tensor] = []
        for size in extent:  # a square has one line of places
            same = axes and not torch.compiler.is_compiling() and not is_tracing() and size == extent[0]
            axes.append(axes[0] if same else torch.arange(size, dtype=torch.float32, device=device))
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        made = cls(coords[None], tuple(extent), on_grid=True)  # (1, N, d)
        object.__setattr__(made, "whole", True)
        return made

    @classmethod
    def _spaced(
        cls,
        extent: Sequence[int],
        device: torch.device | str | None,
        spacing: float | Sequence[float] | None,
        origin: float | Sequence[float] | None,
    ) -> Positions:
        at = cls.grid(extent, device)
        steps = each_axis("spacing", 1.0 if spacing is None else spacing, at.axes)
        if not all(step > 0 for step in steps):
            raise ValueError(f"spacing must be above 0, got {spacing}")
        first = [(step - 1) / 2 for step in steps] if origin is None else each_axis("origin", origin, at.axes)
        if all(step == 1 for step in steps) and not any(first):
            return at
        scale, shift = (numbers(x, at.coords.device) for x in (steps, first))
        coords = (exact(at.coords) * scale + shift).to(at.coords.device, at.coords.dtype)
        return cls(coords, at.extent, spacing=tuple(steps))

    @classmethod
    def grids(
        cls, extents: Sequence[Sequence[int]], length: int | None = None, device: torch.device | str | None = None
    ) -> Positions:
        """A padded batch: of each sample all places of its own grid, row by row, then places that hold no token.

        Args:
            extents: of each sample how many places there are along each axis.
            length: how many places a sample has, padding among them; default: those of the largest grid.

        Raises:
            ValueError: for grids that are none, and a length below the largest.
        """
        made = Places.padded(extents, length, device)
        return cls(made.coords, made.extent, on_grid=True, valid=made.valid, box=made.box)

    @classmethod
    def packed(
        cls, extents: Sequence[Sequence[int]], length: int | None = None, device: torch.device | str | None = None
    ) -> Positions:
        """As `grids`, but one row (1, N, d) in which they stand behind each other, and then padding up to the length.

        Which tokens may attend to which is `attention.masks.together`.
        """
        made = Places.packed(extents, length, device)
        return cls(made.coords, made.extent, 0, True, (), made.valid, made.segment, made.box)

    @classmethod
    def sequence(
        cls,
        n: int,
        start: int | Tensor = 0,
        length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Positions:
        """n consecutive places on a line.

        Args:
            n: how many tokens.
            start: the first place; an int, or (B,) where samples differ (left padding: minus the padding).
            length: the extent of the line. Decoding step by step must name it, so that it does not change
                from step to step. Default: start + n, or n where `start` is a tensor.
        """
        steps = torch.arange(n, dtype=torch.float32, device=device)
        if isinstance(start, Tensor):
            first = start.to(device=steps.device, dtype=torch.float32).reshape(-1)
            coords, end, on_grid = first[:, None] + steps, n, False  # (B, N)
        else:
            coords, end = (start + steps)[None], start + n  # (1, N)
            # A graph for all lengths is not narrowed to those for which this holds; nothing is looked at in one.
            free = torch.compiler.is_compiling() or is_tracing()
            on_grid = free or (start >= 0 and (length is None or end <= length))
        return cls(coords[..., None], (end if length is None else length,), on_grid=on_grid)

    @property
    def axes(self) -> int:
        """d, the number of axes."""
        return self.extent.shape[-1] if isinstance(self.extent, Tensor) else len(self.extent)

    @property
    def one_extent(self) -> tuple[int, ...]:
        """The extent, where it is one for all; a ValueError where each sample has its own."""
        if isinstance(self.extent, Tensor):
            raise ValueError(
                f"what is asked for has one extent for all, and these places have {len(self.extent)}, one of each "
                "sample: give images of one size at a time, or an encoding and a policy that follow those (formulas do)"
            )
        return self.extent

    def is_on(self, extent: tuple[int, ...]) -> bool:
        """Whether this is the one extent of all; extents by sample are not looked at."""
        return not isinstance(self.extent, Tensor) and self.extent == extent

    @property
    def largest(self) -> tuple[int, ...]:
        """The extent, or the largest size of all samples along each axis; () where that is not known."""
        return self.box if isinstance(self.extent, Tensor) else self.extent

    @property
    def span(self) -> tuple[float, ...]:
        """The d lengths that a grid for all covers, in patches of training: the extent times the spacing."""
        if not self.spacing:
            return self.one_extent
        return tuple(size * step for size, step in zip(self.one_extent, self.spacing, strict=True))

    def spans(self, prefix: bool = False) -> Tensor:
        """The `span` as float64 on the `float64_device`: (d,) of one grid for all, else (B|1, N|1, d), or with `prefix`
        (B|1, P + N|1, d); it meets coordinates in either case."""
        if not isinstance(self.extent, Tensor):
            return numbers(self.span, self.coords.device)
        sizes = self.sizes(prefix)
        return sizes * numbers(self.spacing, sizes.device) if self.spacing else sizes

    def middle(self) -> Tensor:
        """The place in the middle of the grid, as `spans`."""
        if isinstance(self.extent, Tensor):
            return (self.spans() - 1) / 2
        return numbers([(size - 1) / 2 for size in self.span], self.coords.device)

    def sizes(self, prefix: bool = True) -> Tensor:
        """(B|1, P + N|1, d) float64 on the `float64_device`: the extent of each token's grid."""
        if not isinstance(self.extent, Tensor):
            return numbers(self.extent, self.coords.device)[None, None]
        sizes, segment = exact(self.extent), self.segments() if prefix else self.segment
        return sizes[:, None] if segment is None else sizes[segment.to(sizes.device)]

    def segments(self) -> Tensor | None:
        """(1, P + N) int64, of images in a row which one each token belongs to, prefix tokens included."""
        if self.segment is None or not self.prefix:
            return self.segment
        if not isinstance(self.extent, Tensor):
            raise ValueError("of a row with one extent for all it is not known which document prefix tokens belong to")
        return torch.cat([of_prefix(self.prefix, len(self.extent), self.segment.device), self.segment], dim=1)

    def held(self) -> Tensor | None:
        """(B|1, P + N) bool, which tokens are one, prefix tokens included; None: all."""
        return None if self.valid is None else F.pad(self.valid, (self.prefix, 0), value=True)

    def take(self, index: Tensor) -> Positions:
        """Keep the places at `index`: (K,) the same for all samples, or (B, K) for each sample its own.

        `index` counts tokens that have a place, prefix tokens not among them. The extent stays.
        """
        if index.ndim == 1:
            return self._taken(self.coords[:, index], index)
        if index.ndim != 2:
            raise ValueError(f"index must be (K,) or (B, K), got {tuple(index.shape)}")
        if self.coords.shape[0] not in (1, index.shape[0]):
            raise ValueError(f"index is for {index.shape[0]} samples, coords for {self.coords.shape[0]}")
        coords = self.coords.expand(index.shape[0], -1, -1)
        where = index[..., None].expand(-1, -1, self.axes)  # (B, K, d)
        return self._taken(coords.gather(1, where), index)

    def _taken(self, coords: Tensor, index: Tensor) -> Positions:
        valid, segment = taken(self.valid, index), taken(self.segment, index)
        return Positions(coords, self.extent, self.prefix, self.on_grid, self.spacing, valid, segment, self.box)

    def moved(self, coords: Tensor, on_grid: bool = False) -> Positions:
        """The same tokens at other places (B|1, N, d) of the same grids."""
        return Positions(coords, self.extent, self.prefix, on_grid, self.spacing, self.valid, self.segment, self.box)

    def with_prefix(self, prefix: int) -> Positions:
        """The same places behind `prefix` leading tokens that have none (a total, not an increment)."""
        made = Positions(
            self.coords, self.extent, prefix, self.on_grid, self.spacing, self.valid, self.segment, self.box
        )
        object.__setattr__(made, "whole", self.whole)
        return made

    def memoize(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` derives from these places alone, made once for all blocks that are handed them.

        It lives and dies with this object, and so with one forward; nothing is kept on a shape. Not while compiling,
        where the compiler sees the repetition itself. (docs/decisions/0004)
        """
        if torch.compiler.is_compiling():
            return make()
        key = (key, torch.is_inference_mode_enabled())  # inference tensors cannot serve a later training step
        if key not in self._memo:
            self._memo[key] = make()
        found: T = self._memo[key]
        return found

    def places(self) -> Tensor:
        """(B|1, N, d) int64 coordinates, for encodings that look places up in a table; a ValueError for fractional
        ones, wherever they can be looked at."""
        if self.on_grid:
            return self.coords.long()
        if self.spacing:
            raise between_places(self.spacing)
        bounds = self.bounds()
        if bounds is not None and not bounds.whole:
            raise between_places(())
        return self.coords.round().long()

    def on_integers(self) -> bool:
        """Whether all places are known to be whole numbers; not in a graph, which looks at none, nor where they learn.
        A ValueError for infinite ones, wherever they can be looked at."""
        if self.on_grid:
            return True
        if self.spacing or self.by_sample():  # between those that a table has, or farther apart
            return False
        bounds = self.bounds()
        if bounds is not None and not all(map(math.isfinite, (*bounds.least, *bounds.most))):
            raise ValueError(f"places must be finite, got places from {bounds.least} to {bounds.most}")
        return bounds is not None and bounds.whole and not self.coords.requires_grad

    def by_sample(self) -> bool:
        """Whether extents, or ratios by which places were scaled, differ by sample; nobody looks at such places."""
        return isinstance(self.extent, Tensor) or (self.source is not None and self.source[1].ndim > 1)

    def assume(self, least: Sequence[float], most: Sequence[float]) -> Positions:
        """These places, known to be fractional and to lie between these bounds, which are then not read."""
        if readable(self.coords):
            self.memoize("bounds", lambda: Bounds(list(least), list(most), False))
        return self

    def bounds(self) -> Bounds | None:
        """Where the places lie, read once; None without any, and where they cannot be looked at (see `readable`)."""
        if not self.coords.numel() or not readable(self.coords) or self.by_sample():
            return None
        return self.memoize("bounds", lambda: Bounds.of(self.coords))


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed for tensors of a device: there, or on the CPU where it has none.

    Apple's MPS, NPUs and some of Intel's GPUs have none. What is made there has to be moved to its tensors.
    """
    lacks = device.type in ("mps", "npu", "hpu")
    if device.type == "xpu":
        lacks = not torch.xpu.get_device_properties(device).has_fp64
    return torch.device("cpu") if lacks else device


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """(n,) float64 on the `float64_device`, made there: the host would wait for a copy, and no CUDA graph takes one.

    A graph for converters keeps them as one constant. An ONNX file would hold single numbers in float32.
    """
    device = float64_device(device)
    if device.type in ("cpu", "meta") or is_tracing() or torch.compiler.is_exporting():
        return torch.tensor(values, dtype=torch.float64, device=device)
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def exact(coords: Tensor) -> Tensor:
    """Coordinates in float64, on their `float64_device`."""
    return coords.to(float64_device(coords.device)).double()  # the device first


def offsets(q: Positions, k: Positions, axis: int) -> Tensor:
    """(B|1, Nq, Nk) float64 distance with sign along one axis, query minus key, patch units."""
    return exact(q.coords)[..., axis, None] - exact(k.coords)[..., None, :, axis]


DISTANCES = ("euclidean", "squared", "manhattan", "chebyshev")  # ‖x‖₂, ‖x‖₂², Σ|x_a|, max|x_a|


def distance(q: Positions, k: Positions, kind: str = "euclidean") -> Tensor:
    """(B|1, Nq, Nk) float64 distance, patch units; `kind` is a word of `DISTANCES`."""
    if q.axes == 1 and kind != "squared":
        return offsets(q, k, 0).abs()
    squares = kind in ("euclidean", "squared")
    total = _magnitude(offsets(q, k, 0), squares)
    for axis in range(1, q.axes):
        step = _magnitude(offsets(q, k, axis), squares)
        total = torch.maximum(total, step) if kind == "chebyshev" else total + step
    return total.sqrt() if kind == "euclidean" else total


def _magnitude(x: Tensor, squares: bool) -> Tensor:
    return x.square() if squares else x.abs()


register_dataclass(Positions, serialized_type_name="vit2dpe.positions.Positions")
