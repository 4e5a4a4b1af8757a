"""Grids of several sizes at once: places of a padded batch, and of images that stand behind each other in a row.

Only constructors read sizes as numbers; from there on they are tensors that no forward reads (docs/decisions/0025).

Legend: B samples, S images in a row, N places of a sample or row, d axes, P prefix tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

Extent = tuple[int, ...] | Tensor  # one for all; or int64 (B, d) of each sample, (S, d) of each image of a row
Span = tuple[float, ...] | Tensor  # lengths of the d axes: of one grid for all; or float64 (B|1, N|1, d) of each token


is_tracing: Callable[[], bool] = torch.jit.is_tracing


class Places(NamedTuple):
    """What a `Positions` of several grids is made of; see there."""

    coords: Tensor
    extent: Tensor
    valid: Tensor | None
    segment: Tensor | None
    box: tuple[int, ...]

    @classmethod
    def padded(cls, extents: Sequence[Sequence[int]], length: int | None, device: torch.device | str | None) -> Places:
        """Each grid a sample, row by row, then places that hold no token, at 0, up to the length: (B, N, d)."""
        sizes, counts = _checked(extents), [math.prod(extent) for extent in extents]
        most = max(counts)
        if length is not None and length < most:
            raise ValueError(f"length must be at least {most}, that of the largest of these grids, got {length}")
        extent = torch.tensor(sizes).to(device, non_blocking=True)  # (B, d)
        step = torch.arange(most if length is None else length, device=device)  # (N,)
        valid = step < extent.prod(-1, keepdim=True)
        return cls(_row_major(step, extent[:, None], valid), extent, valid, None, _largest(sizes))

    @classmethod
    def packed(cls, extents: Sequence[Sequence[int]], length: int | None, device: torch.device | str | None) -> Places:
        """The grids behind each other in one row, then places that hold no token, of the last image: (1, N, d)."""
        sizes, counts = _checked(extents), [math.prod(extent) for extent in extents]
        total = sum(counts)
        if length is not None and length < total:
            raise ValueError(f"length must be at least {total}, the places of these grids, got {length}")
        rest = 0 if length is None else length - total
        image = torch.arange(len(sizes)).repeat_interleave(
            torch.tensor([*counts[:-1], counts[-1] + rest]), output_size=total + rest
        )
        first = torch.tensor([0, *counts[:-1]]).cumsum(0)
        step, segment = (torch.arange(total + rest) - first[image]).to(device), image.to(device)[None]
        extent = torch.tensor(sizes).to(device)  # (S, d)
        valid = torch.arange(total + rest, device=device)[None] < total if rest else None
        return cls(_row_major(step, extent[segment], valid), extent, valid, segment, _largest(sizes))


def _row_major(step: Tensor, sizes: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N, d) float32: the places that are numbered step (N,) in grids of these sizes (B, 1|N, d), 0 where none is
    valid."""
    rest, along = step, []
    for size in reversed(sizes.unbind(-1)):
        along.append(rest % size)
        rest = rest // size
    coords = torch.stack(along[::-1], dim=-1).to(torch.float32)
    return coords if valid is None else coords * valid[..., None]


def _checked(extents: Sequence[Sequence[int]]) -> list[list[int]]:
    sizes = [list(extent) for extent in extents]
    if not sizes or len({len(one) for one in sizes}) > 1 or not all(one and min(one) >= 1 for one in sizes):
        raise ValueError(
            "grids need at least one extent, all of as many axes and with a place along each: got "
            f"{[tuple(one) for one in sizes]}"
        )
    return sizes


def _largest(sizes: list[list[int]]) -> tuple[int, ...]:
    return tuple(max(along) for along in zip(*sizes, strict=True))


def check(coords: Tensor, extent: Extent, valid: Tensor | None, segment: Tensor | None) -> None:
    """Refuse what a `Positions` cannot be made of; the values of tensors are not looked at."""
    if coords.ndim != 3 or coords.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"coords must be a float32 or float64 tensor (B, N, d), got {coords.dtype} {tuple(coords.shape)}; "
            "Positions.grid and Positions.sequence make one"
        )
    samples, count, axes = coords.shape
    if isinstance(extent, Tensor):
        rows = extent.shape[0] if extent.ndim == 2 and extent.shape[1] == axes else 0
        if extent.dtype != torch.int64 or not rows or (segment is None and rows != samples):
            raise ValueError(
                f"extents by sample must be int64 (B, d), B = {samples} and d = {axes} as coords have, or with "
                f"`segment` (S, d) of S images in a row; got {extent.dtype} {tuple(extent.shape)}"
            )
    elif len(extent) != axes:
        raise ValueError(f"extent must name one size per axis: coords have {axes} axes, extent={extent}")
    for name, given, dtype in (("valid", valid, torch.bool), ("segment", segment, torch.int64)):
        if given is not None and (given.dtype != dtype or given.ndim != 2 or given.shape[1] != count):
            raise ValueError(
                f"{name} must be {dtype} (B|1, N) with N = {count} places, got {given.dtype} {tuple(given.shape)}"
            )


def of_prefix(prefix: int, images: int, device: torch.device) -> Tensor:
    """(1, P) which image each prefix token of a row belongs to: they lead the row, as many of each, in their order.

    Raises:
        ValueError: for a number that is no multiple of the images.
    """
    if prefix % images:
        raise ValueError(f"a row of {images} images has as many prefix tokens of each, got {prefix} in all")
    return torch.arange(prefix, device=device)[None] // max(1, prefix // images)


def taken(of_tokens: Tensor | None, index: Tensor) -> Tensor | None:
    """(B|1, N) at the index (K,), or (B, K) of each sample."""
    if of_tokens is None:
        return None
    if index.ndim == 1:
        return of_tokens[:, index]
    return of_tokens.expand(index.shape[0], -1).gather(1, index)


def each_axis(name: str, value: float | Sequence[float], axes: int) -> list[float]:
    """One finite number of each axis, of one for all or as many as there are axes."""
    found = [value] * axes if isinstance(value, int | float) else list(value)
    if len(found) != axes or not all(isinstance(x, int | float) and math.isfinite(x) for x in found):
        raise ValueError(f"{name} must be one finite number or {axes}, one of each axis, got {value!r}")
    return [float(x) for x in found]


class Bounds(NamedTuple):
    """The least and the largest coordinate along each axis, and whether all are whole numbers."""

    least: list[float]
    most: list[float]
    whole: bool

    @classmethod
    def of(cls, coords: Tensor) -> Bounds:
        """Of places (B, N, d); they are read."""
        places = coords.detach().flatten(0, 1)  # (B N, d)
        least, most = places.aminmax(dim=0)
        whole = (places - places.round() == 0).all().to(places.dtype)  # infinite ones are not
        *ends, whole = torch.cat([least, most, whole[None]]).tolist()
        axes = coords.shape[-1]
        return cls(ends[:axes], ends[axes:], bool(whole))


def longer(length: int, other: int) -> int:
    """The larger of two lengths; an exported program in which one is free keeps it free, a traced graph serves one."""
    if is_tracing():  # lengths are tensors there
        return max(int(length), int(other))
    plain = isinstance(length, int) and isinstance(other, int)  # torch before 2.11 compiles sym_max of no plain numbers
    return cast(int, (max if plain else torch.sym_max)(length, other))


def checkable(tensor: Tensor) -> bool:
    """Whether its values can be tested at no cost but the test: eager mode, on the CPU, a real tensor."""
    return tensor.device.type == "cpu" and readable(tensor)


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at: eager mode, a real tensor, and no CUDA graph that is being captured."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    if not plain or torch.compiler.is_compiling() or is_tracing():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def between_places(spacing: tuple[float, ...]) -> ValueError:
    """The error of an encoding of whole places at fractional ones."""
    if spacing:
        return ValueError(
            f"this encoding looks up whole places in a table, and those of a grid of spacing {spacing} lie "
            "between them; use a continuous encoding (sincos, rope, alibi, ...)"
        )
    return ValueError(
        "this encoding looks places up in a table and takes whole coordinates only; "
        "for fractional ones use a continuous encoding (learned, rope, alibi, ...)"
    )
