"""F01 to F23: bad images and bad folders."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from vit2dpe.data.datasets import load_images
from vit2dpe.data.decode import decode
from vit2dpe.errors import DataError

fault = pytest.mark.fault


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def picture():
    """12 rows, 20 columns, no two alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, picture):
    """Two classes, two splits, three images each, all different."""
    draws = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def refused(path):
    with pytest.raises(DataError) as caught:
        decode(path)
    assert str(path) in str(caught.value)


@fault("F01")
@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0.5, -2])
def test_truncated(tmp_path, picture, ending, keep):
    path = tmp_path / f"x.{ending}"
    picture.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep > 0 else keep])
    refused(path)


@fault("F02", "F03")
@pytest.mark.parametrize("content", [b"", b"<html><body>404</body></html>", b"some text\n" * 50])
def test_no_image_at_all(folder, content):
    path = folder / "train/a/1.png"
    path.write_bytes(content)
    refused(path)
    with pytest.raises(DataError, match="no other image takes its place"):
        load_images("folder", folder)


@fault("F04")
def test_a_flipped_bit(tmp_path, picture):
    path = tmp_path / "x.png"
    picture.save(path)
    data = bytearray(path.read_bytes())
    for place in (60, len(data) // 2, len(data) - 20):
        bad = data.copy()
        bad[place] ^= 4
        path.write_bytes(bad)
        refused(path)


@fault("F05", "F06", "F07")
@pytest.mark.parametrize(
    ("mode", "ending", "said"),
    [
        ("CMYK", "jpg", "CMYK"), ("L", "png", "grayscale"), ("1", "png", "grayscale"), ("P", "png", "palette"),
        ("LA", "png", ""),
    ],
)  # fmt: skip
def test_modes_become_rgb(tmp_path, picture, mode, ending, said):
    path = tmp_path / f"x.{ending}"
    (picture.convert("L").convert("LA") if mode == "LA" else picture.convert(mode)).save(path)
    image, kinds = decode(path)
    assert image.shape == (12, 20, 3)
    assert kinds
    assert said in kinds[0]


@fault("F08")
def test_transparency_is_black(tmp_path):
    image = Image.new("RGBA", (4, 3), (200, 100, 50, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    image.putpixel((1, 0), (200, 100, 50, 128))
    image.save(tmp_path / "x.png")
    pixels, kinds = decode(tmp_path / "x.png")
    assert pixels[0, 0].tolist() == [200, 100, 50]
    assert pixels[0, 1].tolist() == [100, 50, 25]
    assert pixels[2, 3].tolist() == [0, 0, 0]
    assert "transparency composited on black" in " ".join(kinds)


@fault("F09")
def test_sixteen_bits_are_scaled(tmp_path):
    values = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "x.png")
    pixels, _ = decode(tmp_path / "x.png")
    assert pixels[..., 0].tolist() == np.round(values / 257).astype(int).tolist()


@fault("F10")
@pytest.mark.parametrize("turn", [3, 6, 8])
def test_exif_turns(tmp_path, picture, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    picture.save(tmp_path / "x.png", exif=exif)
    pixels, kinds = decode(tmp_path / "x.png")
    expected = np.rot90(np.asarray(picture), {3: 2, 6: 3, 8: 1}[turn])
    assert np.array_equal(pixels, expected)
    assert "EXIF" in kinds[0]


@fault("F11")
def test_an_animation(tmp_path):
    frames = [Image.new("P", (5, 4), i) for i in range(3)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    pixels, kinds = decode(tmp_path / "x.gif")
    assert pixels.shape == (4, 5, 3)
    assert not pixels.any()
    assert "several frames" in kinds[0]


@fault("F12")
def test_a_bomb_is_not_decoded(tmp_path, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 400_000

    def decoded(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(DataError, match=r"x\.png: it has more than 50 megapixels.*not decoded"):
        decode(tmp_path / "x.png")


@fault("F13")
@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_odd_shapes(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png")[0].shape == (size[1], size[0], 3)
    assert decode(tmp_path / "x.png", (8, 6))[0].shape == (8, 6, 3)


@fault("F14")
def test_what_cannot_be_opened(folder):
    (folder / "train/a/link.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(DataError, match=r"link\.png"):
        load_images("folder", folder)
    (folder / "train/a/link.png").unlink()
    (folder / "train/a/x.png").mkdir()
    with pytest.raises(DataError, match=r"x\.png"):
        load_images("folder", folder)


def emptied(place):
    for path in place.iterdir():
        path.unlink()


@fault("F15", "F16", "F17", "F18", "F19")
def test_folders_that_are_no_data(folder, tmp_path):
    emptied(folder / "train/b")
    with pytest.raises(DataError, match=r"train/b holds no image"):
        load_images("folder", folder)
    (folder / "train/b").rmdir()
    with pytest.raises(DataError, match="one class"):
        load_images("folder", folder)
    emptied(folder / "train/a")
    (folder / "train/a").rmdir()
    with pytest.raises(DataError, match="no class folders"):
        load_images("folder", folder)
    with pytest.raises(DataError, match="there is no folder /no/such/root"):
        load_images("folder", "/no/such/root")


@fault("F19")
def test_no_held_out_split(folder):
    (folder / "val").rename(folder / "other")
    notes = load_images("folder", folder).notes
    assert any("no held-out split" in note for note in notes)
    assert any("not read: other" in note for note in notes)
    for path in sorted((folder / "train/b").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"1 of 2 classes have one image.*: b; two of every class"):
        load_images("folder", folder)


@fault("F20")
def test_classes_of_the_splits_differ(folder):
    (folder / "val/b").rename(folder / "val/c")
    with pytest.raises(DataError, match=r"classes that train has not: c"):
        load_images("folder", folder)
    emptied(folder / "val/c")
    (folder / "val/c").rmdir()
    with pytest.raises(DataError, match=r"lacks classes of train: b"):
        load_images("folder", folder)


@fault("F21", "F22")
def test_hidden_folders_and_leaks(folder):
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "x.png").write_bytes(b"no image")
    (folder / "val/a/copy.png").write_bytes((folder / "train/a/0.png").read_bytes())
    data = load_images("folder", folder)
    assert data.classes == ("a", "b")
    assert "same image in train and test: 1" in data.notes


@fault("F23")
def test_cifars_pickles(tmp_path):
    sentinel = tmp_path / "opened"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    place = tmp_path / "cifar" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (place / name).write_bytes(pickle.dumps(Payload()))
    from torchvision.datasets import CIFAR10

    url, CIFAR10.url = CIFAR10.url, "http://127.0.0.1:9/nothing.tar.gz"  # it would be downloaded anew
    try:
        with pytest.raises(DataError, match="could not get CIFAR-10"):
            load_images("cifar10", tmp_path / "cifar")
    finally:
        CIFAR10.url = url
    assert not sentinel.exists()
