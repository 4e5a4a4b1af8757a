"""Random augmentation of a batch, each sample drawn for itself; torchvision's v2 draws once for a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_and_flip(images: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ±shift pixels along both axes (edges reflected) and flip half of them left to right.

    Args:
        images: (B, C, H, W), any dtype.
        shift: largest shift in pixels, below the side.
        flip: whether to flip.
        generator: on the CPU, so that a seed gives the same draws on every device.
    """
    b, _, h, w = images.shape
    rows = _index(b, h, shift, generator)
    cols = _index(b, w, shift, generator)
    if flip:
        mirrored = torch.rand(b, generator=generator) < 0.5
        cols = torch.where(mirrored[:, None], w - 1 - cols, cols)
    rows, cols = rows.to(images.device), cols.to(images.device)
    sample = torch.arange(b, device=images.device)[:, None, None]
    return images.movedim(1, -1)[sample, rows[:, :, None], cols[:, None, :]].movedim(-1, 1)


def _index(batch: int, side: int, shift: int, generator: torch.Generator) -> Tensor:
    """(B, side) source index of each pixel, reflected at the edges."""
    offset = torch.randint(-shift, shift + 1, (batch, 1), generator=generator) if shift else 0
    index = (torch.arange(side) + offset).abs().expand(batch, side)
    return torch.where(index < side, index, 2 * (side - 1) - index)
