"""Pictures at their own aspect ratio: each at the largest size of whole patches of which there are not too many.

    s = sqrt(M p q / (H W)),   size = (p max(1, ⌊s H / p⌋), q max(1, ⌊s W / q⌋)),   a side at most M patches

for a picture of H x W pixels, patches of p x q and at most M of them: about as many patches whatever the aspect, of
which the picture is changed by less than a patch along each side. Sources: NaViT, arXiv 2307.06304; SigLIP 2, arXiv
2502.14786, whose search for s (timm, `get_image_size_for_seq`) ends within a patch of this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..spec import Size
from .datasets import normalize
from .decode import fitted
from .prepare import Picture, rgb_of


def native_size(size: Size, patch: Size, tokens: int) -> Size:
    """(H, W) of a picture of this size in at most so many patches.

    Raises:
        ConfigError: for less than one patch.
    """
    if tokens < 1:
        raise ConfigError(f"max_tokens, the patches of an image, must be at least 1, got {tokens}")
    scale = math.sqrt(tokens * math.prod(patch) / math.prod(size))
    rows, columns = (max(1, math.floor(scale * side / p + 1e-9)) for side, p in zip(size, patch, strict=True))
    return min(rows, tokens // min(columns, tokens)) * patch[0], min(columns, tokens) * patch[1]


@dataclass(frozen=True)
class NativePreparation:
    """`prepare.Preparation` of pictures that keep their aspect ratio.

    Args:
        patch: (rows, columns) of the model's patch.
        tokens: the most patches of an image.
        mean, std: of every channel, for images in [0, 1].
    """

    patch: Size
    tokens: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: Sequence[Picture]) -> list[Tensor]:
        """(C, H, W) of each, float, normalized.

        Raises:
            DataError, ConfigError: as `Preparation`.
        """
        found = []
        for image in images:
            rgb = rgb_of(image, len(self.mean))
            size = native_size((rgb.shape[0], rgb.shape[1]), self.patch, self.tokens)
            brought = fitted(Image.fromarray(rgb), size, "squash")
            pixels = np.asarray(brought if len(self.mean) == 3 else brought.convert("L")).reshape(*size, -1)
            one = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
            found.append(normalize(one.float() / 255, self.mean, self.std)[0])
        return found
