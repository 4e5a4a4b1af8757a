"""TrivialAugment (arXiv 2103.10158) and RandAugment (arXiv 1909.13719) on a batch, drawn for each sample by itself.

The operations, their ranges and the 31 steps are torchvision's (`TrivialAugmentWide`, `RandAugment`), nearest pixel,
black outside. A batch is split by operation, and each operation runs once on its samples, with a strength for each;
torchvision's functions have one strength for all. timm's posterize with Pillow 13 raises at 0 bits: ours keeps at
least 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Size
from .augment import Share

Operation = Callable[[Tensor, Tensor], Tensor]  # images (B, C, H, W), strengths (B,)
STEPS = 31
AUGMENTATIONS = ("none", "trivial", "rand")


def trivial(images: Tensor, generator: torch.Generator, *, share: Share | None = None) -> Tensor:
    """One random operation of random strength a sample. Images uint8 (B, C, H, W)."""
    share = share or Share(len(images))
    step = torch.randint(STEPS, (share.total,), generator=generator)
    return _one(images, step, generator, share, wide=True)


def rand(
    images: Tensor,
    generator: torch.Generator,
    *,
    ops: int = 2,
    magnitude: int = 9,
    share: Share | None = None,
) -> Tensor:
    """`ops` random operations after each other, each of strength `magnitude` out of 30. Images uint8 (B, C, H, W)."""
    share = share or Share(len(images))
    for _ in range(ops):
        images = _one(images, torch.full((share.total,), magnitude), generator, share, wide=False)
    return images


def _one(images: Tensor, step: Tensor, generator: torch.Generator, share: Share, *, wide: bool) -> Tensor:
    """One operation a sample, of strength `step` (total,) out of `STEPS` - 1."""
    h, w = images.shape[-2:]
    total, samples = share
    chosen = torch.randint(len(OPERATIONS), (total,), generator=generator)[samples]
    sign = torch.where(torch.rand(total, generator=generator) < 0.5, -1.0, 1.0)[samples]
    level = step[samples] / (STEPS - 1)
    out = images.clone()
    for number, (name, operation) in enumerate(OPERATIONS.items()):
        index = (chosen == number).nonzero()[:, 0]
        if len(index):
            strength = strengths(name, level[index], (h, w), wide)
            if name not in UNSIGNED:
                strength = strength * sign[index]
            index = index.to(images.device)
            out[index] = operation(images[index], strength.to(images.device))
    return out


def strengths(name: str, level: Tensor, size: Size, wide: bool) -> Tensor:
    """The strength of an operation at a level in [0, 1]: tangent of an angle, pixels, degrees, factors or bits."""
    if name in ("translate_x", "translate_y"):
        side = size[1] if name == "translate_x" else size[0]
        return (level * (32.0 if wide else 150 / 331 * side)).trunc()
    if name == "posterize":
        return 8 - (level * (6 if wide else 4)).round()
    if name == "solarize":
        return 255 * (1 - level)
    most = dict(shear_x=0.99 if wide else 0.3, shear_y=0.99 if wide else 0.3, rotate=135.0 if wide else 30.0)
    return level * most.get(name, 0.99 if wide else 0.9)


def affine(images: Tensor, matrix: Tensor, about: tuple[float, float]) -> Tensor:
    """Output pixel p = the input pixel nearest to matrix (p - about) + about; black outside.

    Args:
        matrix: (B, 2, 3), on (x, y, 1) in pixels.
        about: (x, y) of the fixed point, in pixel coordinates with centres at integers.
    """
    h, w = images.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(side, device=images.device) for side in (h, w)), indexing="ij")
    points = torch.stack([x - about[0], y - about[1], torch.ones_like(x)]).flatten(1).float()  # (3, HW)
    source = matrix.float() @ points  # (B, 2, HW)
    grid = torch.stack([2 * (source[:, 0] + about[0] + 0.5) / w - 1, 2 * (source[:, 1] + about[1] + 0.5) / h - 1], -1)
    out = F.grid_sample(images.float(), grid.view(-1, h, w, 2), mode="nearest", align_corners=False)
    return out.to(images.dtype)


def _matrix(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """(B, 2, 3) from two rows of three entries, numbers or (B,)."""
    return torch.stack([torch.stack([like * 0 + value for value in row], -1) for row in rows], -2)


def _linear(rows: Callable[[Tensor], list[list[Tensor | float]]], about: float) -> Operation:
    """The operation whose matrix is `rows(strength)`, about (about, about)."""
    return lambda images, s: affine(images, _matrix(rows(s), s), (about, about))


def _rotate(images: Tensor, s: Tensor) -> Tensor:
    """Counter-clockwise, in degrees, about the middle."""
    cos, sin = torch.cos(s * math.pi / 180), torch.sin(s * math.pi / 180)
    h, w = images.shape[-2:]
    return affine(images, _matrix([[cos, -sin, 0], [sin, cos, 0]], s), ((w - 1) / 2, (h - 1) / 2))


def _blend(images: Tensor, other: Tensor, s: Tensor) -> Tensor:
    """other + (1 + s) (images - other), in [0, 255]."""
    mixed = other + (1 + s).view(-1, 1, 1, 1) * (images.float() - other)
    return mixed.clamp(0, 255).to(images.dtype)


def gray(images: Tensor) -> Tensor:
    """(B, 1, H, W), rounded down: the luma of ITU-R 601."""
    if images.shape[1] != 3:
        return images.float().mean(1, keepdim=True).floor()
    weight = torch.tensor([0.2989, 0.587, 0.114], device=images.device).view(3, 1, 1)
    return (images.float() * weight).sum(1, keepdim=True).floor()


def _brightness(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images, dtype=torch.float32), s)


def _color(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, gray(images).expand(images.shape), s)


def _contrast(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, gray(images).mean((1, 2, 3), keepdim=True), s)


def _sharpness(images: Tensor, s: Tensor) -> Tensor:
    if min(images.shape[-2:]) <= 2:
        return images
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 3, 3)
    blurred = images.float()
    blurred[..., 1:-1, 1:-1] = F.conv2d(images.float(), kernel, groups=images.shape[1]).round()
    return _blend(images, blurred, s)


def _posterize(images: Tensor, s: Tensor) -> Tensor:
    step = (2 ** (8 - s)).view(-1, 1, 1, 1)
    return (torch.div(images.float(), step, rounding_mode="floor") * step).to(images.dtype)


def _solarize(images: Tensor, s: Tensor) -> Tensor:
    return torch.where(images >= s.view(-1, 1, 1, 1), 255 - images, images)


def _torchvision(name: str) -> Operation:
    """An operation of torchvision's that has no strength."""

    def operation(images: Tensor, s: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(images)

    return operation


OPERATIONS: dict[str, Operation] = dict(
    identity=lambda images, s: images,
    shear_x=_linear(lambda s: [[1, s, 0], [0, 1, 0]], -0.5),
    shear_y=_linear(lambda s: [[1, 0, 0], [s, 1, 0]], -0.5),
    translate_x=_linear(lambda s: [[1, 0, -s], [0, 1, 0]], 0),
    translate_y=_linear(lambda s: [[1, 0, 0], [0, 1, -s]], 0),
    rotate=_rotate, brightness=_brightness, color=_color, contrast=_contrast, sharpness=_sharpness,
    posterize=_posterize, solarize=_solarize, autocontrast=_torchvision("autocontrast"),
    equalize=_torchvision("equalize"),
)  # fmt: skip
UNSIGNED = ("identity", "posterize", "solarize", "autocontrast", "equalize")
