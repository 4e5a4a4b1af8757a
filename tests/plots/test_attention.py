"""Whose attention to an image can be drawn, and the refusals of the others."""

import pytest
from PIL import Image

from vit2dpe import ConfigError, Swin, ViT
from vit2dpe.models.simmim import SimMIM
from vit2dpe.plots import attention as show

pytestmark = pytest.mark.need("F4c")
MICRO = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)


def test_refusals_name_what_is_inside(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    swin = Swin("relative", img_size=16, patch_size=2, embed_dim=16, depths=(1,), num_heads=(2,), num_classes=0)
    for model, message in (
        (ViT("rope", **MICRO, in_chans=13), "this ViT takes images of 13 channels, a file has 3"),
        (SimMIM(swin, mask_unit=4), "this is a SimMIM around a Swin"),
        (swin, "this is a Swin"),
    ):
        with pytest.raises(ConfigError, match=message):
            show.save(model, tmp_path / "cat.png", tmp_path / "a.png")
    simmim = SimMIM(ViT("rope", **MICRO), mask_unit=8)
    assert show.save(simmim, tmp_path / "cat.png", tmp_path / "a.png").stat().st_size > 1000
