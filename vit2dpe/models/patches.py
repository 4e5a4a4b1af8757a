"""From images to tokens, patch by patch, and where they are.

Legend: B batch, C channels, D width, N tokens, p patch side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encodings.tables import replace
from ..errors import ConfigError
from ..positions import Positions
from ..segments import nested
from .kernels import CONVS, resampled
from .strided import check_stride, strided_grid, strided_places


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map; timm's names (`proj`). Of images, or of any axes (`CONVS`):
    tubes of a video (frames before rows before columns: ViViT, arXiv 2103.15691), pieces of a line.

    Args:
        patch: (rows, columns) of a patch in pixels, or its sides along all axes.
        in_chans: C.
        dim: D.
        img_size: (height, width) that is expected where `any_size` is off, or all sides.
        bias: whether the map has a bias.
        norm: factory `width -> norm layer` of a norm after the map.
        any_size: whether images of other sizes are taken.
        pad: fill images up to a multiple of the patch with zeros, below and on the right.
        stride: from patch to patch; default: the patch (`strided.py`).
    """

    def __init__(
        self,
        patch: tuple[int, ...],
        in_chans: int,
        dim: int,
        *,
        img_size: tuple[int, ...],
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        any_size: bool = True,
        pad: bool = False,
        stride: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.img_size, self.any_size, self.pad = patch, img_size, any_size, pad
        self.stride = stride  # None: the patch, also where that changes
        if stride is not None:
            check_stride(stride, patch)
        self.proj = CONVS[len(patch)](in_chans, dim, kernel_size=patch, stride=stride or patch, bias=bias)
        self.norm = nn.Identity() if norm is None else norm(dim)

    def grid(self, *size: int) -> tuple[int, ...]:
        """Patches along each axis of an image of this height and width, or of these sides.

        Raises:
            ConfigError: if the size is not one this model takes.
        """
        if len(size) != len(self.patch_size):
            raise ConfigError(f"an input has the {len(self.patch_size)} axes of a patch, got sides {size}")
        if self.stride is not None:
            return strided_grid(size, self.patch_size, self.stride, self.pad)
        return self.patches(*size)

    def patches(self, *size: int) -> tuple[int, ...]:
        """`grid` without a stride: the grid of training, in which places are measured."""
        each = list(zip(size, self.patch_size, strict=True))
        if self.pad:
            return tuple((side + p - 1) // p for side, p in each)  # no negative number, which ONNX divides otherwise
        if any(side < p or side % p for side, p in each):
            patch, came, near = (
                "x".join(map(str, sides))
                for sides in (self.patch_size, size, (max(1, round(side / p)) * p for side, p in each))
            )
            raise ConfigError(f"the image must be a multiple of the patch {patch}: got {came}; nearest: {near}")
        return tuple(side // p for side, p in each)

    # timm's names.

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Patches along each axis at the model's own size."""
        return self.grid(*self.img_size)

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid_size)

    @property
    def strict_img_size(self) -> bool:
        """Whether other sizes than `img_size` are refused."""
        return not self.any_size

    @strict_img_size.setter
    def strict_img_size(self, strict: bool) -> None:
        self.any_size = not strict

    @property
    def dynamic_img_pad(self) -> bool:
        """Whether images are filled up to a multiple of the patch."""
        return self.pad

    def dynamic_feat_size(self, img_size: tuple[int, ...]) -> tuple[int, ...]:
        """`grid` of a size (height, width)."""
        return self.grid(*img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, ...]:
        """Pixels a token covers along the axes, or the larger of both."""
        step = self.stride or self.patch_size
        return max(step) if as_scalar else step

    def places(self, extent: tuple[int, ...], device: torch.device | str | None = None) -> Positions:
        """Where the patches of a grid are."""
        if self.stride is None:
            return Positions.grid(extent, device)
        return strided_places(extent, self.patch_size, self.stride, device)

    def resample(self, patch: tuple[int, ...]) -> None:
        """Another patch: its kernel is made by the pseudo-inverse of resizing images (FlexiViT, arXiv 2212.08013)."""
        with torch.no_grad():
            kernel = resampled(self.proj.weight, patch)
        replace(self.proj.weight, kernel)
        if self.stride is not None:
            check_stride(self.stride, patch)
        self.proj.kernel_size = self.patch_size = patch
        self.proj.stride = self.stride or patch

    def forward(self, images: Tensor) -> tuple[Tensor, Positions]:
        """(B, C, height, width), or all sides, -> tokens (B, N, D) in the weights' dtype, and where they are."""
        if isinstance(images, list | tuple | dict):  # whatever its annotation promises
            raise ConfigError(f"one tensor (B, C, H, W) is taken here, got {type(images).__name__}; a ViT takes lists")
        if images.is_nested:
            raise nested("give images of one size as a tensor (B, C, H, W)")
        size = tuple(images.shape[2:])
        if not self.any_size and size != self.img_size:
            raise ConfigError(
                f"this model takes {self.img_size} images only, got {size}; dynamic_img_size=True or "
                "set_input_size change that"
            )
        extent = self.grid(*size)
        if self.pad:
            steps = self.stride or self.patch_size
            each = zip(extent, steps, self.patch_size, size, strict=True)
            lacking = [(n - 1) * step + p - side for n, step, p, side in each]
            images = F.pad(images, [x for side in reversed(lacking) for x in (0, side)])
        tokens = self.norm(self.proj(images).flatten(2).transpose(1, 2))
        # The residual stream keeps the precision of the weights under autocast, with any encoding.
        return tokens.to(self.proj.weight.dtype), self.places(extent, images.device)
