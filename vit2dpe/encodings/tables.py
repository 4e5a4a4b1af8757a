"""Resizing a learned table: what happens to it when the grid is not the one it was learned on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(table: Tensor, sizes: tuple[int, ...], *, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    """Resize the last d dimensions of `table` (C, *old) to `sizes`, in float32 at least.

    Both bicubic and bilinear kernels are products of kernels along the axes, so the axes are done one after
    the other: the same for a line, an image and a volume. An axis that keeps its size keeps its bits.
    `size=` is always given, never a scale factor, whose rounding is off by one at some sizes. While compiling no axis
    is skipped: resizing to the same size changes no bit, and a branch on the size would be a graph for each.
    """
    dtype = table.dtype
    wide = table.float() if dtype.itemsize < 4 else table
    for axis, size in enumerate(sizes, start=1):
        if not torch.compiler.is_compiling() and wide.shape[axis] == size:
            continue
        moved = wide.movedim(axis, -2)  # (..., old, last)
        image = moved.reshape(1, -1, moved.shape[-2], moved.shape[-1])
        image = F.interpolate(image, (size, image.shape[-1]), mode=mode, antialias=antialias, align_corners=False)
        wide = image.reshape(*moved.shape[:-2], size, moved.shape[-1]).movedim(-2, axis)
    return wide.to(dtype)
