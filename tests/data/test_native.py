"""Pictures at their own aspect ratio, in whole patches of which there are not too many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.naflex_transforms import get_image_size_for_seq

from vit2dpe import ConfigError
from vit2dpe.data.native import NativePreparation, native_size


@pytest.mark.parametrize("patch", [(16, 16), (8, 4)])
@pytest.mark.parametrize("size", [(480, 640), (640, 480), (33, 1000), (1000, 3), (7, 7), (224, 224)])
@pytest.mark.parametrize("tokens", [1, 7, 196, 576])
def test_as_many_patches_as_fit_at_the_same_aspect(size, patch, tokens):
    height, width = native_size(size, patch, tokens)
    rows, columns = height / patch[0], width / patch[1]
    assert rows == int(rows) >= 1
    assert columns == int(columns) >= 1
    assert rows * columns <= tokens
    scale = (tokens * patch[0] * patch[1] / (size[0] * size[1])) ** 0.5
    if min(scale * size[0] / patch[0], scale * size[1] / patch[1]) >= 1:  # else one row of patches is too wide
        assert abs(rows - scale * size[0] / patch[0]) < 1
        assert abs(columns - scale * size[1] / patch[1]) < 1


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (333, 1000), (224, 224)])
def test_timms_search_ends_within_a_patch(size):
    _, theirs = get_image_size_for_seq(size, 16, 196)
    assert all(abs(a - b) <= 16 for a, b in zip(native_size(size, (16, 16), 196), theirs, strict=True))


def test_all_of_the_picture_is_kept():
    """A picture of the wanted size keeps its pixels; rows come before columns, and one channel is grey."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    (found,) = NativePreparation((8, 8), 6, (0.5,) * 3, (0.25,) * 3)([pixels])
    torch.testing.assert_close(found, (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25)
    (grey,) = NativePreparation((8, 8), 6, (0.0,), (1.0,))([Image.fromarray(pixels)])
    assert grey.shape == (1, 16, 24)


def test_no_patch_is_refused():
    with pytest.raises(ConfigError, match="max_tokens, the patches of an image, must be at least 1, got 0"):
        native_size((8, 8), (4, 4), 0)
