"""Patches that overlap: a stride below the patch, for denser features from the same weights.

    patch i covers pixels i s to i s + p - 1; its centre is at i s / p in patches of the training grid

so patches at stride p have the coordinates that they were trained at, and those between them lie between. n = (S - p) /
s + 1 patches cover the image's S / p patches of training, whatever s is, and that is what policies measure.

Sources: dense features of DINO, arXiv 2112.05814 (`dino-vit-features`, `ViTExtractor(stride=4)`), where the table of
places is resized to n x n. How ours differs: any encoding; a table is read at the centres of patches, where resizing to
n places puts the outer ones up to (p - s) / 2 pixels farther out.

Legend: S side of the image, p of a patch, s stride, n patches along an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..encodings import PositionEncoding, encodings_of
from ..errors import ConfigError
from ..positions import Positions, exact, numbers
from ..resolution.policies import Interpolate

Sides = tuple[int, ...]


def check_stride(stride: Sides, patch: Sides) -> None:
    """Refuse a stride that leaves pixels out."""
    if any(s > p for s, p in zip(stride, patch, strict=True)):
        raise ConfigError(f"patch_stride must be at most patch_size, which is {patch}, got {stride}")


def strided_grid(size: Sides, patch: Sides, stride: Sides, pad: bool) -> Sides:
    """How many patches there are along each axis.

    Args:
        pad: of an image that is filled up.

    Raises:
        ConfigError: if the last patches do not end where the image does.
    """
    each = list(zip(size, patch, stride, strict=True))
    if not pad and any(side < p or (side - p) % s for side, p, s in each):
        came, near = (
            "x".join(map(str, sides)) for sides in (size, (max(0, (x - p + s // 2) // s) * s + p for x, p, s in each))
        )
        raise ConfigError(
            f"patches of {patch} at stride {stride} must end where the image does: got {came}; nearest: {near}"
        )
    return tuple((max(side, p) - p + s - 1) // s + 1 for side, p, s in each)


def strided_places(extent: Sides, patch: Sides, stride: Sides, device: torch.device | str | None) -> Positions:
    """Where these patches are. Their `spacing` is what they cover over how many they are, a little more than s / p."""
    steps = [s / p for s, p in zip(stride, patch, strict=True)]
    at = Positions.grid(extent, device)
    coords = (exact(at.coords) * numbers(steps, at.coords.device)).to(at.coords.device, at.coords.dtype)
    spacing = tuple((step * (n - 1) + 1) / n for step, n in zip(steps, extent, strict=True))
    return Positions(coords, at.one_extent, spacing=spacing)


@dataclass(frozen=True)
class Between(Interpolate):
    """`interpolate` where nobody chose a policy; measured anew where the grid of training changes."""


def read_between(
    model: nn.Module, extent: Callable[[PositionEncoding], Sides], inside: list[PositionEncoding] | None = None
) -> None:
    """Have tables that would be resized read between their entries instead, measured from the grid of training.

    Args:
        extent: the extent that an encoding was trained on.
        inside: encodings that are measured by a window.

    Raises:
        ConfigError: for a table of a window, whose entries are those of its tokens.
    """
    for encoding in encodings_of(model):
        own = encoding.own_policy
        resized = own is None or own.name == "resize" or isinstance(own, Between)
        if not (encoding.resizes and "interpolate" in encoding.policies and resized):
            continue
        if any(encoding is one for one in inside or ()):
            raise ConfigError(
                f"window_tables measures {type(encoding).__name__} by the window, and patches at a stride below "
                "patch_size stand between its entries: leave patch_stride out, or window_tables"
            )
        encoding.own_policy = Between(extent(encoding))
