"""TrivialAugment (arXiv 2103.10158) and RandAugment (arXiv 1909.13719) on a batch, drawn for each sample by itself.

The operations, their ranges and the 31 steps are torchvision's (`TrivialAugmentWide`, `RandAugment`), nearest pixel,
black outside. A batch is sorted by operation, and each operation runs once on its samples, with a strength for each,
the affine ones all at once; torchvision's functions have one strength for all. timm's posterize with Pillow 13 raises
at 0 bits: ours keeps at least 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Size
from .augment import Share
from .transfer import onto

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
    rank = torch.tensor([SORTED.index(name) for name in OPERATIONS])[chosen]
    order, counts = rank.argsort(stable=True), counted(rank)
    strength, maps = [], [torch.empty(0, 8)]
    for name, index in zip(SORTED, order.split(counts), strict=True):
        s = strengths(name, level[index], (h, w), wide)
        strength.append(s if name in UNSIGNED else s * sign[index])
        if name in AFFINE:
            maps.append(AFFINE[name](strength[-1], (h, w)))
    # Numbers of samples are exact in float32 up to 2^24: one copy for all.
    packed = torch.cat([order.float(), *strength, torch.cat(maps).flatten()])
    place, amount, affine_maps = onto(packed, images.device).split([len(order), len(order), 8 * sum(map(len, maps))])
    place = place.long()
    results, rest = [], images[place]
    for name, count in zip(SORTED, counts, strict=True):
        if count and name not in AFFINE:
            results.append(OPERATIONS[name](rest[:count], amount[:count]))
            rest, amount = rest[count:], amount[count:]
    if len(rest):
        results.append(affine(rest, affine_maps.view(-1, 8)))
    return torch.empty_like(images).index_copy_(0, place, torch.cat(results)) if results else images


def counted(rank: Tensor) -> list[int]:
    """How many samples each operation of `SORTED` has."""
    return rank.bincount(minlength=len(SORTED)).tolist()


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


def affine(images: Tensor, maps: Tensor) -> Tensor:
    """Output pixel p = the input pixel nearest to matrix (p - about) + about; black outside.

    Args:
        maps: (B, 8), the rows of a matrix (2, 3) on (x, y, 1) in pixels, then (x, y) of the fixed point `about`, in
            pixel coordinates with centres at integers.
    """
    h, w = images.shape[-2:]
    matrix, about = maps[:, :6].view(-1, 2, 3), maps[:, 6:]
    x, y = (torch.arange(side, device=images.device) - about[:, i, None] for i, side in enumerate((w, h)))
    x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])  # (B, H, W)
    source = matrix @ torch.stack([x, y, torch.ones_like(x)], 1).flatten(2)  # (B, 2, HW)
    source = 2 * (source + about[:, :, None] + 0.5)
    grid = torch.stack([source[:, 0] / w - 1, source[:, 1] / h - 1], -1).view(-1, h, w, 2)
    out = F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
    return out.to(images.dtype)


def _maps(*numbers: Tensor | float) -> Tensor:
    """(B, 8) of numbers or (B,)."""
    return torch.stack(torch.broadcast_tensors(*(torch.as_tensor(number) for number in numbers)), -1).float()


def _rotation(s: Tensor, size: Size) -> Tensor:
    """Counter-clockwise, in degrees, about the middle."""
    cos, sin = torch.cos(s * math.pi / 180), torch.sin(s * math.pi / 180)
    return _maps(cos, -sin, 0, sin, cos, 0, (size[1] - 1) / 2, (size[0] - 1) / 2)


AFFINE: dict[str, Callable[[Tensor, Size], Tensor]] = dict(
    shear_x=lambda s, size: _maps(1, s, 0, 0, 1, 0, -0.5, -0.5),
    shear_y=lambda s, size: _maps(1, 0, 0, s, 1, 0, -0.5, -0.5),
    translate_x=lambda s, size: _maps(1, 0, -s, 0, 1, 0, 0, 0),
    translate_y=lambda s, size: _maps(1, 0, 0, 0, 1, -s, 0, 0),
    rotate=_rotation,
)


def _affine(name: str) -> Operation:
    return lambda images, s: affine(images, AFFINE[name](s, (images.shape[-2], images.shape[-1])))


def _blend(images: Tensor, other: Tensor, s: Tensor) -> Tensor:
    """other + (1 + s) (images - other), in [0, 255]."""
    mixed = other + (1 + s).view(-1, 1, 1, 1) * (images.float() - other)
    return mixed.clamp(0, 255).to(images.dtype)


def gray(images: Tensor) -> Tensor:
    """(B, 1, H, W), rounded down: the luma of ITU-R 601."""
    if images.shape[1] != 3:
        return images.float().mean(1, keepdim=True).floor()
    red, green, blue = images.float().split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()


def _brightness(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images, dtype=torch.float32), s)


def _color(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, gray(images).expand(images.shape), s)


def _contrast(images: Tensor, s: Tensor) -> Tensor:
    return _blend(images, gray(images).mean((1, 2, 3), keepdim=True), s)


def _sharpness(images: Tensor, s: Tensor) -> Tensor:
    if min(images.shape[-2:]) <= 2:
        return images
    kernel = torch.full((3, 3), 1 / 13, device=images.device)
    kernel[1, 1].fill_(5 / 13)
    kernel = kernel.expand(images.shape[1], 1, 3, 3)
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
    **{name: _affine(name) for name in AFFINE},
    brightness=_brightness, color=_color, contrast=_contrast, sharpness=_sharpness,
    posterize=_posterize, solarize=_solarize, autocontrast=_torchvision("autocontrast"),
    equalize=_torchvision("equalize"),
)  # fmt: skip
UNSIGNED = ("identity", "posterize", "solarize", "autocontrast", "equalize")
SORTED = sorted(OPERATIONS, key=AFFINE.__contains__)  # the affine ones last
