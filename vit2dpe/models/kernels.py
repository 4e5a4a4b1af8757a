"""Kernels of the patch embedding on lines, images and volumes: their convolution, and another patch or a further axis.

Legend: D width, C channels, p sides of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor, nn

from ..encodings.tables import resize

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: dict[int, Callable[..., Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def resampled(kernel: Tensor, patch: tuple[int, ...]) -> Tensor:
    """The kernel (D, C, *p) for another patch, by the pseudo-inverse of resizing images (FlexiViT, arXiv 2212.08013).

    Images by timm. Resizing is done axis by axis, so that its pseudo-inverse is the product of theirs.
    """
    if len(patch) == 2:
        made: Tensor = resample_patch_embed(kernel, list(patch))
        return made
    wide = kernel.float() if kernel.dtype.itemsize < 4 else kernel
    for axis, (old, new) in enumerate(zip(kernel.shape[2:], patch, strict=True), start=2):
        if old != new:
            back = torch.linalg.pinv(resize(torch.eye(old, dtype=wide.dtype), (new,)))  # (new, old) of (old, new)
            wide = torch.tensordot(wide, back.to(wide.device), dims=([axis], [1])).movedim(-1, axis)
    return wide.to(kernel.dtype).contiguous()
