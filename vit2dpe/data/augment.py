"""Random augmentation of a batch, with draws of its own for each sample; torchvision's v2 draws once for a batch.

Draws come from a generator on the CPU, so that a seed gives the same ones on every device, and are made for the whole
batch of which `images` are a `Share`, so that they do not depend on the rank.

Legend: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Size
from .transfer import onto


class Share(NamedTuple):
    """The samples that one process has of a batch: `samples` of `total`."""

    total: int
    samples: slice = slice(None)


def shift_and_flip(
    images: Tensor, shift: int, flip: bool, generator: torch.Generator, *, share: Share | None = None
) -> Tensor:
    """Shift each image by up to ±shift pixels along both axes (edges reflected) and flip half of them left to right.

    Args:
        images: (B, C, H, W), any dtype.
        shift: largest shift in pixels, below the side.
        flip: whether to flip.
    """
    b, _, h, w = images.shape
    total, samples = share or Share(b)
    rows = _index(total, h, shift, generator)
    cols = _index(total, w, shift, generator)
    if flip:
        mirrored = torch.rand(total, generator=generator) < 0.5
        cols = torch.where(mirrored[:, None], w - 1 - cols, cols)
    rows, cols = onto(torch.cat([rows, cols], dim=1)[samples], images.device).split([h, w], dim=1)
    sample = torch.arange(b, device=images.device)[:, None, None]
    return images.movedim(1, -1)[sample, rows[:, :, None], cols[:, None, :]].movedim(-1, 1)  # (B, C, H, W)


def _index(batch: int, side: int, shift: int, generator: torch.Generator) -> Tensor:
    """(B, side) source index of each pixel, reflected at the edges."""
    offset = torch.randint(-shift, shift + 1, (batch, 1), generator=generator) if shift else 0
    index = (torch.arange(side) + offset).abs().expand(batch, side)
    return torch.where(index < side, index, 2 * (side - 1) - index)


class Boxes(NamedTuple):
    """Rectangles in pixels, one a sample: (B,) each, float32."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def draw_boxes(
    batch: int,
    size: Size,
    generator: torch.Generator,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Boxes, Tensor]:
    """A random rectangle a sample: share of the area (uniform) and ratio width / height (log-uniform) between bounds.

    As in torchvision the first of ten draws that fits the image is used.

    Returns:
        the boxes, and whether a draw fitted, (B,) bool.
    """
    h, w = size
    share = torch.empty(batch, 10).uniform_(*area, generator=generator) * h * w
    log_ratio = torch.empty(batch, 10).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator)
    width, height = (share * log_ratio.exp()).sqrt().round(), (share / log_ratio.exp()).sqrt().round()
    fits = (width >= 1) & (height >= 1) & (width <= w) & (height <= h)
    first = fits.int().argmax(1, keepdim=True)
    width, height = width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]
    top, left = (torch.rand(batch, generator=generator) for _ in "yx")
    top, left = (top * (h - height + 1)).floor(), (left * (w - width + 1)).floor()
    return Boxes(top, left, height, width), fits.any(1)


def resized_crop(
    images: Tensor,
    size: Size,
    smallest: float,
    flip: bool,
    generator: torch.Generator,
    *,
    share: Share | None = None,
) -> Tensor:
    """A random part of each image, at least `smallest` of its area and 3:4 to 4:3, resized (bilinear), half flipped.

    Args:
        images: (B, C, H, W) uint8.
        size: (H', W') of the result.

    Returns:
        uint8 (B, C, H', W').
    """
    b, _, h, w = images.shape
    total, samples = share or Share(b)
    box, fits = draw_boxes(total, (h, w), generator, area=(smallest, 1.0), ratio=(3 / 4, 4 / 3))
    parts = [torch.where(fits, side, whole) for side, whole in zip(box, (0, 0, h, w), strict=True)]
    mirrored = (torch.rand(total, generator=generator) < 0.5).float() if flip else torch.zeros(total)
    drawn = onto(torch.stack([*parts, mirrored])[:, samples, None], images.device)  # (5, B, 1)
    top, left, height, width, mirrored = drawn
    along = [(torch.arange(side, device=images.device) + 0.5) / side for side in size]
    columns = torch.where(mirrored > 0, 1 - along[1], along[1])
    y, x = 2 * (top + along[0] * height) / h - 1, 2 * (left + columns * width) / w - 1  # (B, H'), (B, W')
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)  # (B, H', W', 2), x before y
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.round().clamp(0, 255).to(torch.uint8)


def erase(images: Tensor, probability: float, generator: torch.Generator, *, share: Share | None = None) -> Tensor:
    """Random erasing (arXiv 1708.04896): with this probability a rectangle of 2 to 33% of the area becomes 0, the mean.

    Args:
        images: (B, C, H, W), normalised.
    """
    b, _, h, w = images.shape
    total, samples = share or Share(b)
    box, fits = draw_boxes(total, (h, w), generator, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    chosen = fits & (torch.rand(total, generator=generator) < probability)
    drawn = onto((torch.stack(box) * chosen)[:, samples], images.device)  # (4, B); of the others nothing is inside
    return images.masked_fill(_inside(Boxes(*drawn), (h, w))[:, None], 0)


def mix(
    images: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899), drawn for each sample; both: a coin decides for each.

    Sample i is mixed with sample B - 1 - i; so a rank mixes within its own share, and with mixing two processes do not
    train bit for bit as one does. Unlike timm's, the batch size may be odd. timm's `Mixup` draws from numpy's global
    generator.

    Args:
        images: (B, C, H, W).
        labels: (B,) int64.
        mixup, cutmix: α of the weight's distribution Beta(α, α); 0: none.

    Returns:
        the images, and targets (B, classes) float32.
    """
    b, _, h, w = images.shape
    total, samples = share or Share(b)
    draws = np.random.default_rng(seed)
    cut = draws.random(total) < (1.0 if not mixup else 0.0 if not cutmix else 0.5)
    weight = np.where(cut, draws.beta(cutmix or 1, cutmix or 1, total), draws.beta(mixup or 1, mixup or 1, total))
    centre = draws.random((2, total))
    keep, cut_, at = (  # (B,), (B,), (2, B)
        torch.from_numpy(np.ascontiguousarray(v[..., samples])) for v in (weight, cut, centre)
    )
    half_h, half_w = h * (1 - keep).sqrt() / 2, w * (1 - keep).sqrt() / 2
    top, left = (at[0] * h - half_h).clamp(0).floor(), (at[1] * w - half_w).clamp(0).floor()
    bottom, right = (at[0] * h + half_h).clamp(max=h).floor(), (at[1] * w + half_w).clamp(max=w).floor()
    height, width = (bottom - top) * cut_, (right - left) * cut_
    # The box is clipped at the edges: labels are weighted by the area that is left.
    keep = torch.where(cut_, 1 - height * width / (h * w), keep)
    blend = torch.where(cut_, 1.0, keep)
    drawn = onto(torch.stack([keep, blend, top, left, height, width]).float(), images.device)  # (6, B)
    keep, blend, *box = drawn
    partner = images.flip(0)
    blended = torch.lerp(partner, images, blend.to(images.dtype)[:, None, None, None])
    images = torch.where(_inside(Boxes(*box), (h, w))[:, None], partner, blended)
    target = F.one_hot(labels, classes).float()  # (B, classes)
    return images, torch.lerp(target.flip(0), target, keep[:, None])


def _inside(box: Boxes, size: Size) -> Tensor:
    """(B, H, W) bool: whether a pixel is in its sample's box."""
    rows, cols = (torch.arange(side, device=box.top.device) for side in size)
    y = (rows >= box.top[:, None]) & (rows < (box.top + box.height)[:, None])
    x = (cols >= box.left[:, None]) & (cols < (box.left + box.width)[:, None])
    return y[:, :, None] & x[:, None, :]
