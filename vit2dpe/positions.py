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
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.export import register_dataclass

from .segments import Segments

T = TypeVar("T")
is_tracing: Callable[[], bool] = torch.jit.is_tracing


def longer(length: int, other: int) -> int:
    """The larger of two lengths; an exported program in which one is free keeps it free, a traced graph serves one."""
    if is_tracing():  # lengths are tensors there
        return max(int(length), int(other))
    plain = isinstance(length, int) and isinstance(other, int)  # torch before 2.11 compiles sym_max of no plain numbers
    return cast(int, (max if plain else torch.sym_max)(length, other))


class Bounds(NamedTuple):
    """The least and the largest coordinate along each axis, and whether all are whole numbers."""

    least: list[float]
    most: list[float]
    whole: bool


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
            few tokens still live on the whole grid.
        prefix: leading tokens that have no place (class token, registers). They have no row in `coords`.
        on_grid: that all places are known to be whole numbers inside the extent, by how they were made. Others are
            looked at where a table is about to be read at them, once; on a GPU the host waits for that. In a graph,
            which looks at nothing, others are taken to be fractional.
        spacing: how far apart neighbours on this grid are, one number for each axis; () where it is 1. Coordinates
            stay in patches of the training grid, the extent counts places of this one: it covers `span`.
        row: of a packed row, where the tokens of its segments are; encodings are evaluated there.

    Raises:
        ValueError: if `coords` is not (B, N, d) in at least float32, or `extent` does not name d sizes.
    """

    coords: Tensor
    extent: tuple[int, ...]
    prefix: int = 0
    on_grid: bool = False
    spacing: tuple[float, ...] = ()
    row: Row | None = None
    whole: bool = field(default=False, init=False, repr=False)  # made by `grid`: all places, row by row
    # Of scaled places: those that were scaled, and the ratio (d,) float64 of their offsets.
    source: tuple[Positions, Tensor] | None = field(default=None, init=False, repr=False)
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)  # see `memoize`

    def __post_init__(self) -> None:
        if not isinstance(self.coords, Tensor):
            return  # a tree of something else, while a pytree is mapped over
        object.__setattr__(self, "extent", tuple(self.extent))
        # Half precision cannot tell place 257 from 258.
        if self.coords.ndim != 3 or self.coords.dtype not in (torch.float32, torch.float64):
            came = f"{self.coords.dtype} {tuple(self.coords.shape)}"
            raise ValueError(
                f"coords must be a float32 or float64 tensor (B, N, d), got {came}; "
                "Positions.grid and Positions.sequence make one"
            )
        if self.coords.shape[-1] != len(self.extent):
            raise ValueError(
                f"extent must name one size per axis: coords have {self.coords.shape[-1]} axes, extent={self.extent}"
            )

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
        steps = _each("spacing", 1.0 if spacing is None else spacing, at.axes)
        if not all(step > 0 for step in steps):
            raise ValueError(f"spacing must be above 0, got {spacing}")
        first = [(step - 1) / 2 for step in steps] if origin is None else _each("origin", origin, at.axes)
        if all(step == 1 for step in steps) and not any(first):
            return at
        scale, shift = (numbers(x, at.coords.device) for x in (steps, first))
        coords = (exact(at.coords) * scale + shift).to(at.coords.device, at.coords.dtype)
        return cls(coords, at.extent, spacing=tuple(steps))

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
        return len(self.extent)

    @property
    def span(self) -> tuple[float, ...]:
        """The d lengths that the grid covers, in patches of training: the extent times the spacing."""
        if not self.spacing:
            return self.extent
        return tuple(size * step for size, step in zip(self.extent, self.spacing, strict=True))

    def take(self, index: Tensor) -> Positions:
        """Keep the places at `index`: (K,) the same for all samples, or (B, K) for each sample its own.

        `index` counts tokens that have a place, prefix tokens not among them. The extent stays.
        """
        if index.ndim == 1:
            return Positions(self.coords[:, index], self.extent, self.prefix, self.on_grid, self.spacing)
        if index.ndim != 2:
            raise ValueError(f"index must be (K,) or (B, K), got {tuple(index.shape)}")
        if self.coords.shape[0] not in (1, index.shape[0]):
            raise ValueError(f"index is for {index.shape[0]} samples, coords for {self.coords.shape[0]}")
        coords = self.coords.expand(index.shape[0], -1, -1)
        where = index[..., None].expand(-1, -1, self.axes)  # (B, K, d)
        return Positions(coords.gather(1, where), self.extent, self.prefix, self.on_grid, self.spacing)

    def with_prefix(self, prefix: int) -> Positions:
        """The same places behind `prefix` leading tokens that have none (a total, not an increment)."""
        made = Positions(self.coords, self.extent, prefix, self.on_grid, self.spacing)
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
        """(B|1, N, d) int64 coordinates, for encodings that look places up in a table.

        Raises:
            ValueError: for fractional coordinates, wherever they can be looked at.
        """
        if self.on_grid:
            return self.coords.long()
        if self.spacing:
            raise ValueError(
                f"this encoding looks up whole places in a table, and those of a grid of spacing {self.spacing} lie "
                "between them; use a continuous encoding (sincos, rope, alibi, ...)"
            )
        bounds = self.bounds()
        if bounds is not None and not bounds.whole:
            raise ValueError(
                "this encoding looks places up in a table and takes whole coordinates only; "
                "for fractional ones use a continuous encoding (learned, rope, alibi, ...)"
            )
        return self.coords.round().long()

    def on_integers(self) -> bool:
        """Whether all places are known to be whole numbers; not in a graph, which looks at none, nor where they learn.

        Raises:
            ValueError: for infinite places, wherever they can be looked at.
        """
        if self.on_grid:
            return True
        if self.spacing:  # between those that a table has, or farther apart
            return False
        bounds = self.bounds()
        if bounds is not None and not all(map(math.isfinite, (*bounds.least, *bounds.most))):
            raise ValueError(f"places must be finite, got places from {bounds.least} to {bounds.most}")
        return bounds is not None and bounds.whole and not self.coords.requires_grad

    def assume(self, least: Sequence[float], most: Sequence[float]) -> Positions:
        """These places, known to be fractional and to lie between these bounds, which are then not read."""
        if readable(self.coords):
            self.memoize("bounds", lambda: Bounds(list(least), list(most), False))
        return self

    def bounds(self) -> Bounds | None:
        """Where the places lie, read once; None without any, and where they cannot be looked at (see `readable`)."""
        if not self.coords.numel() or not readable(self.coords):
            return None
        return self.memoize("bounds", self._bounds)

    def _bounds(self) -> Bounds:
        places = self.coords.detach().flatten(0, 1)  # (B N, d)
        least, most = places.aminmax(dim=0)
        whole = (places - places.round() == 0).all().to(places.dtype)  # infinite ones are not
        *ends, whole = torch.cat([least, most, whole[None]]).tolist()
        return Bounds(ends[: self.axes], ends[self.axes :], bool(whole))


def _each(name: str, value: float | Sequence[float], axes: int) -> list[float]:
    found = [value] * axes if isinstance(value, int | float) else list(value)
    if len(found) != axes or not all(isinstance(x, int | float) and math.isfinite(x) for x in found):
        raise ValueError(f"{name} must be one finite number or {axes}, one of each axis, got {value!r}")
    return [float(x) for x in found]


def checkable(tensor: Tensor) -> bool:
    """Whether its values can be tested at no cost but the test: eager mode, on the CPU, a real tensor."""
    return tensor.device.type == "cpu" and readable(tensor)


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: eager mode, a real tensor, and no CUDA graph that is being captured."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    if not plain or torch.compiler.is_compiling() or is_tracing():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


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
