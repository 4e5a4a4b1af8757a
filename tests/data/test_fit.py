"""Images of several sizes become images of one: crop, pad and squash against torchvision's, done by hand on PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from tests.data.pictures import pixels, save
from vit2dpe.data.datasets import load_fitted, load_images
from vit2dpe.data.decode import FORMATS, REFUSED, decode, size_of, suffixes
from vit2dpe.data.photos import how_fitted, sizes_for, source_size, survey, train_size
from vit2dpe.data.settings import DataConfig, patch_for, source_of
from vit2dpe.errors import ConfigError, DataError

BICUBIC = InterpolationMode.BICUBIC
TURN = 0x0112


def theirs(image: Image.Image, size: tuple[int, int], fit: str) -> np.ndarray:
    """What a user of torchvision writes, for a square size; its sides are whole pixels for the shapes below."""
    if fit == "squash":
        return np.asarray(tv.resize(image, list(size), BICUBIC))
    if fit == "crop":
        return np.asarray(tv.center_crop(tv.resize(image, min(size), BICUBIC), list(size)))
    scale = max(size) / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (size[1] - width) // 2, (size[0] - height) // 2
    padding = [left, top, size[1] - width - left, size[0] - height - top]
    return np.asarray(tv.pad(tv.resize(image, [height, width], BICUBIC), padding))


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("shape", [(48, 72), (80, 32), (16, 24), (32, 32), (20, 100)])
def test_as_torchvision_does_it(tmp_path: Path, shape: tuple[int, int], turn: int, fit: str) -> None:
    image = Image.fromarray(pixels(3, *shape))
    exif = Image.Exif()
    exif[TURN] = turn
    image.save(tmp_path / "x.png", exif=exif)
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(pixels(3, *shape), {1: 0, 3: 2, 6: 3, 8: 1}[turn])))
    mine = decode(tmp_path / "x.png", (16, 16), fit)[0]
    assert np.array_equal(mine, theirs(upright, (16, 16), fit))
    assert size_of(tmp_path / "x.png") == upright.size[::-1]


def test_a_crop_whose_offset_is_half_a_pixel_lies_in_the_middle(tmp_path: Path) -> None:
    """There torchvision rounds to one side; ours is the mean of both."""
    ramp = np.repeat(np.linspace(0, 255, 31, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(16, axis=0)
    save(tmp_path / "x.png", ramp)
    mine = decode(tmp_path / "x.png", (16, 16))[0].astype(float)
    assert abs((mine + mine[:, ::-1] - 255).mean()) < 1
    assert np.abs(mine - theirs(Image.fromarray(ramp), (16, 16), "crop")).max() <= 9  # half of a step of 8.5, rounded


def test_nothing_is_lost_by_pad_and_nothing_distorted_by_crop(tmp_path: Path) -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, :8], image[16:24, 36:44] = 255, 255  # an edge, and a square in the middle
    save(tmp_path / "x.png", image)
    crop, pad, squash = (
        decode(tmp_path / "x.png", (40, 40), fit)[0][..., 0] > 127 for fit in ("crop", "pad", "squash")
    )
    assert not crop[:, 0].any()
    assert (int(crop.any(1).sum()), int(crop.any(0).sum())) == (8, 8)
    assert pad[12:28, 0].all()
    assert not pad[:9].any()
    assert not pad[31:].any()
    assert squash[:, 0].all()


KINDS = {"jfif": "JPEG", "webp": "WEBP", "avif": "AVIF", "tga": "TGA", "jp2": "JPEG2000", "MPO": "MPO", "pnm": "PPM"}


@pytest.mark.need("D12")
@pytest.mark.parametrize(("suffix", "kind"), KINDS.items())
def test_what_pillow_opens_is_read(root: Path, suffix: str, kind: str) -> None:
    Image.init()
    if kind not in Image.OPEN and kind != "MPO":
        pytest.skip(f"this Pillow opens no {kind}")
    Image.fromarray(pixels(5)).save(root / f"train/cat/x.{suffix}", kind)
    assert len(load_images("folder", root).train) == 7


@pytest.mark.need("D12")
def test_what_is_opened_by_other_programs_is_not_read(root: Path) -> None:
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"} <= set(suffixes())
    assert not {".eps", ".ps", ".pdf", ".mpg", ".wmf"} & set(suffixes())
    assert not set(FORMATS) & set(REFUSED)
    Image.new("RGB", (4, 4)).save(root / "train/cat/x.eps")
    (root / "train/cat/x.eps").rename(root / "train/cat/x.jpg")
    with pytest.raises(DataError, match=r"x\.jpg"):
        load_images("folder", root)
    Image.new("RGB", (8, 6)).save(root / "train/cat/x.tga")
    (root / "train/cat/x.tga").rename(root / "train/cat/x.jpg")  # no number says that it is one
    with pytest.raises(DataError, match=r"x\.jpg"):
        load_images("folder", root)


def photos(root: Path, sizes: list[tuple[int, int]], each: int = 4) -> Path:
    for label, name in enumerate("ab"):
        for i in range(each):
            save(root / name / f"{i}.png", pixels(10 * label + i, *sizes[i % len(sizes)]))
    return root


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("name", [None, "folder"])
def test_photos_of_any_sizes_are_brought_to_one(tmp_path: Path, cache: str, name: str | None) -> None:
    root = photos(tmp_path / "photos", [(40, 70), (90, 50), (48, 48)])
    data = DataConfig(name=name, root=str(root), cache=cache)
    images, found = load_fitted(data, 0, lambda found: (train_size(found), (96, 96)))
    assert found is not None
    assert (found.short, found.smallest, found.largest, found.mixed) == (44, (48, 48), (90, 50), True)
    assert (train_size(found), images.native) == ((32, 32), (44, 44))  # as far as they have it
    assert "48 to 90x50 (height x width), median short side 44: the short side is brought to 44" in images.notes[0]
    first = images.train.pixels(torch.tensor([0]))[0].permute(1, 2, 0).numpy()
    assert any(np.array_equal(first, decode(path, (44, 44))[0]) for path in root.glob("a/*"))
    padded = load_fitted(DataConfig(name=name, root=str(root), cache=cache, fit="pad"), 0, lambda _: ((32, 32),))[0]
    assert padded.digest != load_fitted(data, 0, lambda _: ((32, 32),))[0].digest


def test_images_of_one_size_stay_as_they_are(root: Path) -> None:
    images, found = load_fitted(DataConfig(name="folder", root=str(root)), 0, lambda _: ((4, 4),))
    assert (images.digest, found) == (load_images("folder", root).digest, None)


def test_photos_of_one_camera_are_cropped_where_root_alone_is_given(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", [(40, 64)])
    assert load_fitted(DataConfig(root=str(root)), 0, lambda _: ((32, 32),))[0].native == (32, 32)
    assert load_fitted(DataConfig(name="folder", root=str(root)), 0, lambda _: ((32, 32),))[0].native == (40, 64)


def test_sizes_to_train_at(tmp_path: Path) -> None:
    found = survey(DataConfig(root=str(photos(tmp_path / "photos", [(99, 140), (300, 97)]))))
    assert found is not None
    assert found.short == 98
    assert sizes_for(found) == [32, 48, 64, 96]
    assert sizes_for(found, 32) == [32, 64, 96]
    assert sizes_for(found._replace(short=20)) == [32]
    assert train_size(found._replace(short=2000)) == (224, 224)
    assert source_size(found, [(32, 48), (64, 96)]) == (64, 96)
    assert source_size(found, [(196, 294)]) == (98, 147)
    assert [patch_for((side, side)) for side in (32, 48, 96, 128, 224)] == [4, 8, 8, 16, 16]
    assert patch_for((64, 100)) == 4
    assert "aspect ratio is lost" in how_fitted(found, (32, 32), "squash")


def test_what_is_understood_from_root() -> None:
    assert [source_of(None, root) for root in (None, "photos", "x/labels.CSV", "a.tsv")] == [
        "digits", "folder", "csv", "csv"]  # fmt: skip
    assert source_of("tar", "labels.csv") == "tar"


def test_settings_that_cannot_work(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown data\.fit 'corp'; did you mean 'crop'"):
        load_images("folder", root, fit="corp")
    with pytest.raises(ConfigError, match=r"those of digits have one: leave it out"):
        load_images("digits", fit="pad")
    with pytest.raises(ConfigError, match=rf"no name of a source.*--root {root}"):
        load_images(str(root))
