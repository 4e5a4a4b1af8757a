"""Images and texts of any kind as a trained model takes them, and what its logits say; `predict` of the models.

Legend: B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, DataError
from ..spec import Size
from .datasets import normalize
from .decode import Unreadable, as_rgb, decode
from .splits import scaled

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
NATIVE: dict[str, Size] = {
    "digits": (8, 8),
    "cifar10": (32, 32),
    "cifar100": (32, 32),
}  # data that are read at one size


class Prediction(NamedTuple):
    """The likeliest classes of one image or text, best first, and their probabilities."""

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Preparation:
    """What `vit2dpe evaluate` does to an image before a model sees it.

    It is decoded to RGB (one channel: its grey value) at the size that the crop is taken of, brought there by `fit`,
    normalized, cropped, and scaled. Images of a run on data of one size (`NATIVE`) become of that size first, as the
    images of training were.

    Args:
        size: (H, W) that the model gets.
        mean, std: of every channel, for images in [0, 1].
        fit: crop, pad or squash, see `decode.decode`.
        crop: the centre share of each side that is kept.
        source: (H, W) in decoding; default `size` before the crop.
    """

    size: Size
    mean: Sequence[float]
    std: Sequence[float]
    fit: str = "crop"
    crop: float = 1.0
    source: Size | None = None

    def __call__(self, images: Sequence[Picture]) -> Tensor:
        """(B, C, H, W), float, normalized.

        Raises:
            DataError: for a file that cannot be read.
            ConfigError: for what is no image, and for a model of other than 1 or 3 channels.
        """
        pixels = torch.cat([self.pixels(image) for image in images])
        return scaled(normalize(pixels.float() / 255, self.mean, self.std), self.size, self.crop)

    def pixels(self, image: Picture) -> Tensor:
        """One image before it is normalized, uint8 (1, C, height, width)."""
        size = self.source or (round(self.size[0] / self.crop), round(self.size[1] / self.crop))
        rgb = rgb_of(image, len(self.mean), size, self.fit)
        grey = rgb if len(self.mean) == 3 else np.asarray(Image.fromarray(rgb).convert("L"))[..., None]
        return torch.from_numpy(grey.transpose(2, 0, 1).copy())[None]


def rgb_of(image: Picture, channels: int, size: Size | None = None, fit: str = "crop") -> np.ndarray:
    """uint8 (height, width, 3) of any picture, see `decode.decode`.

    Args:
        channels: of the model's images.

    Raises:
        DataError: for a file that cannot be read.
        ConfigError: for what is no image, and for a model of other than 1 or 3 channels.
    """
    if channels not in (1, 3):
        raise ConfigError(f"the model takes images of {channels} channels; pictures have 1 or 3")
    try:
        if isinstance(image, str | os.PathLike):
            return decode(Path(image), size, fit)[0]
        return as_rgb(image if isinstance(image, Image.Image) else _opened(image), size, fit)[0]
    except Unreadable as error:  # its own message says how a data set does without the image
        raise DataError(f"cannot read the image {image}: {error.reason}") from error


def _opened(image: np.ndarray | Tensor) -> Image.Image:
    """An array of pixels as an image of Pillow's."""
    if not isinstance(image, np.ndarray | Tensor):  # whatever its annotation promises
        raise ConfigError(f"an image is a path, an image of Pillow's, or an array, got {type(image).__name__}")
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise ConfigError(
            f"an image as an array is uint8 (height, width, 3), or (height, width) in grey, got {pixels.dtype} "
            f"{tuple(pixels.shape)}; what is normalized already goes into the model itself, model(images)"
        )
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def pictures(images: Picture | Sequence[Picture]) -> list[Picture]:
    """A list of images, of one or several."""
    if isinstance(images, str | os.PathLike | Image.Image | np.ndarray | Tensor):
        return [images]
    return list(images)


def ranked(logits: Tensor, classes: Sequence[str] | None, k: int) -> list[Prediction]:
    """The k likeliest classes of each row of logits (B, classes); all, where there are fewer.

    Args:
        classes: their names by index; None: their numbers.

    Raises:
        ConfigError: for k below 1, and for other than one name a class.
    """
    count = logits.shape[-1]
    if k < 1:
        raise ConfigError(f"k, the number of classes, must be at least 1, got {k}")
    names = [str(i) for i in range(count)] if classes is None else list(classes)
    if len(names) != count:
        raise ConfigError(f"the model has {count} classes and {len(names)} names of classes")
    top = logits.double().softmax(-1).topk(min(k, count))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [Prediction(tuple(names[i] for i in best), tuple(values)) for best, values in pairs]
