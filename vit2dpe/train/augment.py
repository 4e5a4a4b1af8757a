"""Random augmentation of a batch, each sample drawn for itself; torchvision's v2 draws once for a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_and_flip(
    images: Tensor,
    shift: int,
    flip: bool,
    generator: torch.Generator,
    *,
    of: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Shift each image by up to ±shift pixels along both axes (edges reflected) and flip half of them left to right.

    Args:
        images: (B, C, H, W), any dtype.
        shift: largest shift in pixels, below the side.
        flip: whether to flip.
        generator: on the CPU, so that a seed gives the same draws on every device.
        of, part: `images` are this part of a batch of `of`: the draws are those of the whole batch.
    """
    b, _, h, w = images.shape
    of = b if of is None else of
    rows = _index(of, h, shift, generator)
    cols = _index(of, w, shift, generator)
    if flip:
        mirrored = torch.rand(of, generator=generator) < 0.5
        cols = torch.where(mirrored[:, None], w - 1 - cols, cols)
    rows, cols = rows[part].to(images.device), cols[part].to(images.device)
    sample = torch.arange(b, device=images.device)[:, None, None]
    return images.movedim(1, -1)[sample, rows[:, :, None], cols[:, None, :]].movedim(-1, 1)


def _index(batch: int, side: int, shift: int, generator: torch.Generator) -> Tensor:
    """(B, side) source index of each pixel, reflected at the edges."""
    offset = torch.randint(-shift, shift + 1, (batch, 1), generator=generator) if shift else 0
    index = (torch.arange(side) + offset).abs().expand(batch, side)
    return torch.where(index < side, index, 2 * (side - 1) - index)
