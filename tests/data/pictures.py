"""Files of images that the tests of this folder write, and what refusing them must say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit2dpe.data.datasets import load_images
from vit2dpe.errors import DataError


def pixels(seed: int, rows: int = 6, columns: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def photos(root: Path, each: int = 8, classes: str = "abc", colour: bool = True) -> Path:
    """Class folders of photos of several sizes; those of a class are of its colour, so that it can be learned."""
    for label, name in enumerate(classes):
        for i in range(each):
            image = pixels(100 * label + i, 48 + 9 * (i % 3), 80 - 8 * (i % 4))
            image[..., label % 3] //= 4 if colour else 1
            save(root / name / f"{i}.png", image)
    return root


def refused(root: Path | None, *parts: object, **options: object) -> str:
    """The message of the DataError that loading must raise; it holds all the parts."""
    with pytest.raises(DataError) as caught:
        load_images("folder", root, **options)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    return message
