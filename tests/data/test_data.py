"""Images in memory: every promise of train/data.py and train/images.py, on files made or damaged here."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as TF

from tests.helpers import loaded_modules
from vit2dpe.data import image_cache as images
from vit2dpe.data.datasets import SOURCES, load_images, normalize
from vit2dpe.data.image_cache import decode
from vit2dpe.data.splits import Split, resize
from vit2dpe.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VIT2DPE_CACHE", str(folder))
    return folder


def pixels(seed: int, rows: int = 6, columns: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, 6 x 8 pixels: train 3 each, val 2 each, every image another."""
    seed = 0
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                save(tmp_path / "pets" / split / name / f"{index}.png", pixels(seed))
                seed += 1
    return tmp_path / "pets"


def refused(root: Path | None, *parts: object, **options: object) -> str:
    """The message of the DataError that loading must raise; it holds all the parts."""
    with pytest.raises(DataError) as caught:
        load_images("folder", root, **options)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message
    return message


def split(labels: list[int]) -> Split:
    n = len(labels)
    return Split(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2), torch.tensor(labels))


class TestTake:
    def test_balanced(self) -> None:
        whole = split([0] * 50 + [1] * 30 + [2] * 20)
        assert whole.subsample(30).labels.bincount().tolist() == [10, 10, 10]
        assert whole.subsample(32).labels.bincount().tolist() == [11, 11, 10]

    def test_a_class_that_runs_out_leaves_its_share_to_the_others(self) -> None:
        assert split([0] * 50 + [1] * 3 + [2] * 20).subsample(33).labels.bincount().tolist() == [15, 3, 15]

    def test_same_every_time_nested_and_in_order(self) -> None:
        whole = split([i % 3 for i in range(90)])
        ids = [whole.subsample(n).images[:, 0, 0, 0].tolist() for n in (9, 9, 40)]
        assert ids[0] == ids[1] == sorted(ids[0])
        assert set(ids[0]) < set(ids[2])
        assert ids[0] != list(range(9))  # drawn, not the first ones

    def test_labels_stay_with_their_images(self) -> None:
        part = split([i % 7 for i in range(90)]).subsample(33)
        assert torch.equal(part.images[:, 0, 0, 0].long() % 7, part.labels)

    def test_more_than_there_are(self) -> None:
        whole = split([0, 1])
        assert whole.subsample(5) is whole
        assert len(whole) == 2

    def test_without_what_cannot_be_had_the_others_stay(self) -> None:
        whole = split([i % 3 for i in range(90)])
        ids = [whole.subsample(12, without).images[:, 0, 0, 0].tolist() for without in ((), (), range(0, 90, 3))]
        lost = set(ids[0][:2])
        part = whole.subsample(12, lost)
        left = set(part.images[:, 0, 0, 0].tolist())
        assert part.labels.bincount().tolist() == [4, 4, 4]
        assert set(ids[0]) - lost < left
        assert not lost & left
        assert whole.subsample(90, lost).labels.numel() == 88
        assert not set(ids[2]) & set(range(0, 90, 3))
        assert whole.subsample(12, range(0, 90, 3)).labels.bincount().tolist() == [0, 6, 6]

    @pytest.mark.parametrize("n", [0, -1])
    def test_none_is_refused(self, n: int) -> None:
        with pytest.raises(ConfigError, match=f"at least 1 image, got {n}"):
            split([0, 1]).subsample(n)


class TestDigits:
    def test_contents(self) -> None:
        loaded = load_images("digits")
        assert (len(loaded.train), len(loaded.test), loaded.native) == (1437, 360, (8, 8))
        assert loaded.classes == tuple("0123456789")
        for part in (loaded.train, loaded.test):
            assert part.images.shape[1:] == (1, 8, 8)
            assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
            share = part.labels.bincount() / len(part)
            assert (share - 0.1).abs().max() < 0.005  # stratified
        assert loaded.train.images.max() == 255
        assert loaded.digest == load_images("digits").digest
        assert len(load_images("digits", limit_train=100, limit_test=20).test) == 20

    def test_all_digits_once_with_their_own_values(self) -> None:
        from sklearn.datasets import load_digits

        loaded, original = load_images("digits"), load_digits()
        mine = torch.cat([loaded.train.images, loaded.test.images]).flatten(1).numpy()
        labels = torch.cat([loaded.train.labels, loaded.test.labels]).numpy()
        theirs = np.round(original.data * 255 / 16)
        assert sorted(map(tuple, np.c_[mine, labels])) == sorted(map(tuple, np.c_[theirs, original.target]))

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match=re.escape('pip install "vit2dpe[recipes]"')):
            load_images("digits")

    def test_settings_it_cannot_use(self) -> None:
        with pytest.raises(ConfigError, match="leave out root"):
            load_images("digits", "/somewhere")
        with pytest.raises(ConfigError, match="source_size"):
            load_images("digits", source_size=(16, 16))


class TestFolder:
    def test_contents(self, root: Path) -> None:
        loaded = load_images("folder", root)
        assert loaded.name == "folder"
        assert loaded.classes == ("cat", "dog")
        assert loaded.native == (6, 8)
        assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert loaded.test.labels.tolist() == [0, 0, 1, 1]
        for part, seeds in ((loaded.train, range(6)), (loaded.test, range(6, 10))):
            expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in seeds])
            assert np.array_equal(part.images.numpy(), expected)
            assert part.labels.dtype == torch.int64

    def test_statistics_are_those_of_train_in_float64(self, root: Path) -> None:
        loaded = load_images("folder", root)
        train = loaded.train.images.numpy().astype(np.float64) / 255
        np.testing.assert_allclose(loaded.mean, train.mean((0, 2, 3)), rtol=1e-14)
        np.testing.assert_allclose(loaded.std, train.std((0, 2, 3)), rtol=1e-14)

    def test_a_constant_channel_has_a_std_that_can_be_divided_by(self, root: Path) -> None:
        for file in root.glob("train/*/*.png"):
            flat = np.array(Image.open(file))
            flat[..., 1] = 51
            save(file, flat)
        loaded = load_images("folder", root)
        assert loaded.mean[1] == pytest.approx(0.2, abs=1e-15)
        assert loaded.std[1] == 1.0

    def test_order_does_not_depend_on_the_disk(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = load_images("folder", root).digest
        scandir = os.scandir

        class Backwards:
            def __init__(self, path: Path) -> None:
                self.entries = list(scandir(path))[::-1]

            def __enter__(self) -> list[os.DirEntry[str]]:
                return self.entries

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(os, "scandir", Backwards)
        assert load_images("folder", root).digest == expected

    def test_digest(self, root: Path) -> None:
        first = load_images("folder", root)
        assert re.fullmatch("[0-9a-f]{64}", first.digest)
        assert load_images("folder", str(root)).digest == first.digest
        changed = pixels(7)
        changed[3, 4, 1] ^= 1  # one pixel, one bit, of a test image
        save(root / "val/cat/1.png", changed)
        assert load_images("folder", root).digest != first.digest
        save(root / "val/cat/1.png", pixels(7))
        assert load_images("folder", root).digest == first.digest

    def test_digest_sees_labels(self, root: Path) -> None:
        first = load_images("folder", root).digest
        os.rename(root / "val/cat/1.png", root / "val/dog/!.png")  # the images keep their order
        assert load_images("folder", root).digest != first

    def test_limits(self, root: Path) -> None:
        loaded = load_images("folder", root, limit_train=4, limit_test=2)
        assert loaded.train.labels.tolist() == [0, 0, 1, 1]
        assert loaded.test.labels.tolist() == [0, 1]
        assert loaded.digest != load_images("folder", root).digest

    def test_same_image_in_both_splits_is_told(self, root: Path) -> None:
        assert not [note for note in load_images("folder", root).notes if "same image" in note]
        for name, image in (("cat/8.png", pixels(0)), ("dog/8.png", pixels(0)), ("dog/9.png", pixels(5))):
            save(root / "val" / name, image)
        assert "same image in train and test: 3" in load_images("folder", root).notes

    def test_hidden_entries_are_not_classes_nor_images(self, root: Path) -> None:
        expected = load_images("folder", root).digest
        for hidden in ("train/.ipynb_checkpoints/0.png", "val/__MACOSX/0.png", "train/cat/._0.png"):
            save(root / hidden, pixels(99))
        (root / "train/.DS_Store").write_text("x")
        (root / "train/cat/.ipynb_checkpoints").mkdir()
        loaded = load_images("folder", root)
        assert loaded.classes == ("cat", "dog")
        assert loaded.digest == expected

    def test_other_files_are_told(self, root: Path) -> None:
        (root / "train/cat/LICENSE.txt").write_text("x")
        (root / "train/cat/0.heic").write_text("x")
        (root / "train/README").write_text("beside the classes")
        expected = f"files in {root / 'train/cat'} that are no images by their name, ignored: 2"
        assert expected in load_images("folder", root).notes

    def test_upper_case_names(self, root: Path) -> None:
        save(root / "train/cat/A.PNG", pixels(50))
        assert len(load_images("folder", root).train) == 7

    def test_paths_with_spaces_and_accents(self, root: Path) -> None:
        os.rename(root, root.with_name("més cães 犬"))
        assert len(load_images("folder", root.with_name("més cães 犬")).train) == 6

    def test_test_serves_where_there_is_no_val(self, root: Path) -> None:
        expected = load_images("folder", root).digest
        os.rename(root / "val", root / "test")
        assert load_images("folder", root).digest == expected

    def test_val_comes_before_test_and_that_is_told(self, root: Path) -> None:
        expected = load_images("folder", root).digest
        save(root / "test/cat/0.png", pixels(77))
        loaded = load_images("folder", root)
        assert loaded.digest == expected
        assert f"{root} has both val and test: val is used" in loaded.notes


class TestLayoutFaults:
    def test_no_root(self, tmp_path: Path) -> None:
        refused(None, "--root", "train/<class>")
        refused(tmp_path / "nowhere", tmp_path / "nowhere", "train/<class>")
        (tmp_path / "file").write_text("x")
        refused(tmp_path / "file", tmp_path / "file")

    def test_no_train(self, root: Path) -> None:
        os.rename(root / "train", root / "training")
        refused(root, f"there is no folder {root / 'train'}", "expected <root>/train")

    def test_neither_val_nor_test(self, root: Path) -> None:
        os.rename(root / "val", root / "valid")
        refused(root, root, "neither val nor test", "move some images")

    def test_empty_class(self, root: Path) -> None:
        (root / "train/bird").mkdir()
        refused(root, root / "train/bird", "holds no image", "delete the folder")
        (root / "train/bird/notes.txt").write_text("x")
        refused(root, root / "train/bird", "holds no image")

    def test_empty_class_of_val(self, root: Path) -> None:
        for file in (root / "val/cat").iterdir():
            file.unlink()
        refused(root, root / "val/cat", "holds no image")

    def test_class_that_train_has_not(self, root: Path) -> None:
        save(root / "val/yak/0.png", pixels(9))
        refused(root, root / "val", "classes that train has not: yak (1 in all)", "add them to train")

    def test_class_missing_in_val(self, root: Path) -> None:
        save(root / "train/ant/0.png", pixels(9))
        refused(root, root / "val", "lacks classes of train: ant (1 in all)", "add images")

    def test_one_class(self, root: Path) -> None:
        for part in ("train", "val"):
            os.rename(root / part / "dog", root / f"{part}-dog")
        refused(root, root / "train", "one class (cat)", "two or more")

    def test_images_outside_classes(self, root: Path) -> None:
        save(root / "train/stray.png", pixels(9))
        refused(root, root / "train/stray.png", "in no class folder")

    def test_no_classes(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            (tmp_path / "flat" / part).mkdir(parents=True)
        refused(tmp_path / "flat", tmp_path / "flat/train", "no class folders", "train/<class>/<image>")

    def test_folders_in_a_class(self, root: Path) -> None:
        save(root / "train/cat/persian/0.png", pixels(9))
        refused(root, root / "train/cat", "holds folders (persian)")


class TestTinyImageNet:
    @pytest.fixture
    def tiny(self, root: Path) -> Path:
        """The pets again, laid out as Tiny-ImageNet is downloaded."""
        lines = []
        for name in ("cat", "dog"):
            os.rename(root / "train" / name, root / "moved")
            (root / "train" / name).mkdir()
            os.rename(root / "moved", root / "train" / name / "images")
            (root / "train" / name / f"{name}_boxes.txt").write_text("0.png\t0\t0\t5\t5\n")
        (root / "val/images").mkdir()
        for name in ("dog", "cat"):  # val is not sorted by class
            for index in range(2):
                file = f"val_{len(lines)}.png"
                os.rename(root / "val" / name / f"{index}.png", root / "val/images" / file)
                lines.append(f"{file}\t{name}\t0\t0\t5\t5\n")
            (root / "val" / name).rmdir()
        (root / "val/val_annotations.txt").write_text("".join(lines))
        save(root / "test/images/test_0.png", pixels(70))
        return root

    def test_read_as_class_folders_are(self, tiny: Path) -> None:
        loaded = load_images("folder", tiny)
        assert loaded.classes == ("cat", "dog")
        assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert loaded.test.labels.tolist() == [0, 0, 1, 1]
        expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in range(6, 10)])
        assert np.array_equal(loaded.test.images.numpy(), expected)

    def test_unnamed_image(self, tiny: Path) -> None:
        save(tiny / "val/images/val_9.png", pixels(9))
        refused(tiny, "val_annotations.txt", "the same files", "val/images/val_9.png")

    def test_missing_image(self, tiny: Path) -> None:
        (tiny / "val/images/val_1.png").unlink()
        refused(tiny, "val_annotations.txt", "val/images/val_1.png")

    def test_image_named_twice(self, tiny: Path) -> None:
        with (tiny / "val/val_annotations.txt").open("a") as file:
            file.write("val_0.png\tcat\t0\t0\t5\t5\n")
        refused(tiny, "once each", "val/images/val_0.png")

    def test_broken_line(self, tiny: Path) -> None:
        (tiny / "val/val_annotations.txt").write_text("val_0.png dog\n")
        refused(tiny, tiny / "val/val_annotations.txt", "line 1", "<file> <tab> <class>", "val_0.png dog")

    def test_class_that_train_has_not(self, tiny: Path) -> None:
        file = tiny / "val/val_annotations.txt"
        file.write_text(file.read_text().replace("val_0.png\tdog", "val_0.png\tyak"))
        refused(tiny, "classes that train has not: yak")


def png(width: int, height: int, bits: int, colour: int, raw: bytes | None) -> bytes:
    """A PNG by hand, for what Pillow cannot write; raw None: the header alone."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = b"" if raw is None else chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


class TestConversion:
    def decoded(self, path: Path) -> tuple[np.ndarray, list[str]]:
        image, kinds = decode(path)
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)
        return image, kinds

    def test_rgb_is_untouched(self, tmp_path: Path) -> None:
        image, kinds = self.decoded(save(tmp_path / "a.png", pixels(0)))
        assert np.array_equal(image, pixels(0))
        assert kinds == []

    def test_grayscale(self, tmp_path: Path) -> None:
        gray = pixels(0)[..., 0]
        image, kinds = self.decoded(save(tmp_path / "a.png", gray))
        assert np.array_equal(image, np.stack([gray] * 3, -1))
        assert kinds == ["grayscale images converted to RGB"]

    def test_one_bit(self, tmp_path: Path) -> None:
        bits = pixels(0)[..., 0] > 127
        image, kinds = self.decoded(save(tmp_path / "a.png", Image.fromarray(bits)))
        assert np.array_equal(image[..., 1], bits * np.uint8(255))
        assert kinds == ["grayscale images converted to RGB"]

    def test_palette(self, tmp_path: Path) -> None:
        palette = Image.fromarray(pixels(0)).quantize(200)
        image, kinds = self.decoded(save(tmp_path / "a.png", palette))
        assert np.array_equal(image, np.asarray(palette.convert("RGB")))
        assert kinds == ["palette images converted to RGB"]

    def test_cmyk(self, tmp_path: Path) -> None:
        flat = np.full((16, 16, 3), (200, 100, 40), np.uint8)
        image, kinds = self.decoded(save(tmp_path / "a.jpg", Image.fromarray(flat).convert("CMYK"), quality=95))
        assert abs(image.astype(int) - flat).max() <= 3
        assert kinds == ["CMYK images converted to RGB"]

    def test_alpha_on_black(self, tmp_path: Path) -> None:
        rgba = np.dstack([pixels(0), np.full((6, 8), 255, np.uint8)])
        rgba[0, :, 3], rgba[1, :, 3] = 0, 128
        image, kinds = self.decoded(save(tmp_path / "a.png", Image.fromarray(rgba)))
        assert (image[0] == 0).all()
        assert abs(image[1] - rgba[1, :, :3] * (128 / 255)).max() <= 1
        assert np.array_equal(image[2:], rgba[2:, :, :3])
        assert kinds == ["images with transparency composited on black"]

    def test_gray_with_alpha(self, tmp_path: Path) -> None:
        la = np.dstack([pixels(0)[..., 0], np.full((6, 8), 255, np.uint8)])
        la[0, :, 1] = 0
        image, kinds = self.decoded(save(tmp_path / "a.png", Image.fromarray(la, "LA")))
        assert (image[0] == 0).all()
        assert np.array_equal(image[1:, :, 2], la[1:, :, 0])
        assert len(kinds) == 2

    def test_transparent_palette_entry(self, tmp_path: Path) -> None:
        indices = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
        indices.putpalette([255, 0, 0, 0, 255, 0])
        image, _ = self.decoded(save(tmp_path / "a.png", indices, transparency=0))
        assert image.tolist() == [[[0, 0, 0], [0, 255, 0]], [[0, 255, 0], [0, 0, 0]]]

    def test_16_bit_gray_is_scaled(self, tmp_path: Path) -> None:
        values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
        for name, options in (("a.png", {}), ("a.tif", {}), ("a.pgm", {})):
            image, kinds = self.decoded(save(tmp_path / name, Image.fromarray(values), **options))
            assert np.array_equal(image[..., 0], np.round(values / 257).astype(np.uint8))
            assert kinds == ["16-bit images converted to RGB"]

    def test_16_bit_rgb_is_scaled(self, tmp_path: Path) -> None:
        values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
        rows = np.stack([values] * 3, -1).astype(">u2")
        (tmp_path / "a.png").write_bytes(png(32, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)))
        image, _ = self.decoded(tmp_path / "a.png")
        assert abs(image[..., 0].astype(int) - values / 257).max() <= 1  # Pillow keeps the high byte

    def test_32_bit_is_refused(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), np.float32)))
        with pytest.raises(DataError, match=f"{path}.*no defined white.*8 or 16 bits"):
            decode(path)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image, kinds = self.decoded(save(tmp_path / "a.png", pixels(0), exif=exif))
        x = pixels(0)
        upright = [x, x[:, ::-1], x[::-1, ::-1], x[::-1], x.swapaxes(0, 1), np.rot90(x, -1)]
        upright += [np.rot90(x.swapaxes(0, 1), 2), np.rot90(x)]
        assert np.array_equal(image, upright[orientation - 1])
        assert bool(kinds) == (orientation != 1)

    def test_exif_orientation_of_a_jpeg(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        plain, _ = decode(save(tmp_path / "a.jpg", pixels(0)))
        turned, kinds = decode(save(tmp_path / "b.jpg", pixels(0), exif=exif))
        assert np.array_equal(turned, np.rot90(plain, -1))
        assert kinds == ["images turned upright by their EXIF orientation"]

    def test_animation(self, tmp_path: Path) -> None:
        frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        image, kinds = self.decoded(tmp_path / "a.gif")
        assert (image == 10).all()
        assert "images of several frames, first one used" in kinds

    @pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
    def test_extreme_shapes(self, tmp_path: Path, size: tuple[int, int]) -> None:
        path = save(tmp_path / "a.png", pixels(0, *size))
        assert decode(path)[0].shape == (*size, 3)
        assert decode(path, (4, 6))[0].shape == (4, 6, 3)

    def test_conversions_are_counted_and_remembered(self, root: Path) -> None:
        for index in range(3):
            save(root / f"train/cat/gray{index}.png", pixels(30 + index)[..., 0])
        for _ in range(2):  # decoded, then from the cache
            assert "grayscale images converted to RGB: 3" in load_images("folder", root).notes


def encoded(fmt: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(3, 32, 32)).save(file, fmt)
    return file.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


DAMAGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "half a jpeg": ("x.jpg", lambda: encoded("JPEG")[: -len(encoded("JPEG")) // 3]),
    "jpeg header cut": ("x.jpg", lambda: encoded("JPEG")[:100]),
    "jpeg without its last two bytes": ("x.jpg", lambda: encoded("JPEG")[:-2]),
    "half a png": ("x.png", lambda: encoded("PNG")[: len(encoded("PNG")) // 2]),
    "png without its last two bytes": ("x.png", lambda: encoded("PNG")[:-2]),
    "png with a flipped bit": ("x.png", lambda: flipped(encoded("PNG"), 1500)),
    "png with a wrong checksum": ("x.png", lambda: flipped(encoded("PNG"), len(encoded("PNG")) - 14)),
    "png header alone": ("x.png", lambda: png(32, 32, 8, 2, None)),
    "half a webp": ("x.webp", lambda: encoded("WEBP")[: len(encoded("WEBP")) // 2]),
    "half a bmp": ("x.bmp", lambda: encoded("BMP")[:2000]),
    "nothing": ("x.jpg", lambda: b""),
    "html": ("x.jpg", lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "postscript": ("x.jpg", lambda: encoded("EPS")),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGE)
    def test_damaged_file_is_named(self, root: Path, kind: str) -> None:
        name, content = DAMAGE[kind]
        path = root / "train/dog" / name
        path.write_bytes(content())
        refused(root, f"cannot read the image {path}:", "repair or delete it", source_size=(32, 32))

    def test_truncation_before_the_pixels_are_converted(self, tmp_path: Path) -> None:
        """The same for modes that take another way through the decoder."""
        for mode in ("L", "CMYK"):
            path = save(tmp_path / f"{mode}.jpg", Image.fromarray(pixels(0, 64, 64)).convert(mode))
            path.write_bytes(path.read_bytes()[:-200])
            with pytest.raises(DataError, match=f"{path}.*truncated"):
                decode(path)

    def test_postscript_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "x.jpg").write_bytes(encoded("EPS"))
        with pytest.raises(DataError, match="cannot identify image file"):  # not: Ghostscript failed
            decode(tmp_path / "x.jpg")

    def test_dangling_link(self, root: Path) -> None:
        (root / "train/dog/x.jpg").symlink_to(root / "gone.jpg")
        refused(root, root / "train/dog/x.jpg", "No such file")

    def test_folder_named_as_an_image(self, root: Path) -> None:
        (root / "train/dog/x.jpg").mkdir()
        refused(root, root / "train/dog/x.jpg", "directory")

    def test_nothing_is_cached_after_a_failure(self, root: Path, cache: Path) -> None:
        (root / "train/dog/x.jpg").write_bytes(b"")
        refused(root, "x.jpg")
        assert not cache.exists()

    # 51 megapixels, where Pillow says nothing; 100, where it warns; 400, where it refuses by itself.
    @pytest.mark.parametrize("side", [(10_000, 5_100), (10_000, 10_000), (20_000, 20_000)])
    def test_bomb_is_refused_by_its_header(self, root: Path, side: tuple[int, int]) -> None:
        path = root / "train/cat/bomb.png"
        path.write_bytes(png(*side, 8, 2, None))
        refused(root, f"the image {path}: it has more than 50 megapixels", "not decoded", "make it smaller")

    def test_bomb_costs_nothing(self, tmp_path: Path) -> None:
        resource = pytest.importorskip("resource")
        rows = zlib.compressobj()
        raw = b"".join([rows.compress(b"\0" * 2501) for _ in range(20_000)])  # 1 bit a pixel, all black
        idat = b"IDAT" + raw + rows.flush()
        header = png(20_000, 20_000, 1, 0, None)
        body = struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
        (tmp_path / "bomb.png").write_bytes(header[:33] + body + header[33:])
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with pytest.raises(DataError, match="50 megapixels"):
            decode(tmp_path / "bomb.png")
        assert time.perf_counter() - start < 0.5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; the image would be 400,000


class TestSizes:
    def test_two_sizes_are_refused(self, root: Path) -> None:
        odd = save(root / "val/dog/odd.png", pixels(0, 6, 9))
        refused(root, root / "train/cat/0.png", "6x8", odd, "6x9", "source_size")

    def test_source_size_brings_them_together(self, root: Path) -> None:
        save(root / "val/dog/odd.png", pixels(0, 60, 9))
        loaded = load_images("folder", root, source_size=(5, 7))
        assert loaded.native == (5, 7)
        assert len(loaded.test) == 5

    def test_centre_is_kept(self, tmp_path: Path) -> None:
        stripes = np.zeros((10, 30, 3), np.uint8)
        stripes[:, 10:20] = 255  # the middle square is white
        for image in (stripes, stripes.swapaxes(0, 1)):
            assert (decode(save(tmp_path / "a.png", image), (10, 10))[0] == 255).all()

    def test_shorter_side_decides(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", pixels(0, 40, 60))
        resized = Image.fromarray(pixels(0, 40, 60)).resize((30, 20), Image.Resampling.BICUBIC)
        assert np.array_equal(decode(path, (20, 20))[0], np.asarray(resized)[:, 5:25])

    def test_resizing_is_antialiased(self, tmp_path: Path) -> None:
        board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
        image, _ = decode(save(tmp_path / "a.png", np.stack([board] * 3, -1).astype(np.uint8)), (8, 8))
        assert abs(image.astype(int) - 127).max() <= 3

    def test_own_size_is_untouched(self, root: Path) -> None:
        assert load_images("folder", root, source_size=(6, 8)).digest == load_images("folder", root).digest

    @pytest.mark.parametrize("cache", ["memory", "none"])
    def test_size_that_is_none(self, root: Path, cache: str) -> None:
        with pytest.raises(ConfigError, match="source_size must be two positive numbers"):
            load_images("folder", root, source_size=(0, 8), cache=cache)


class TestCache:
    @pytest.fixture
    def decodings(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """One entry for every time that the files are decoded."""
        calls: list[object] = []
        real = images.decode_all
        monkeypatch.setattr(images, "decode_all", lambda *args: calls.append(args) or real(*args))
        return calls

    def files(self, folder: Path) -> list[Path]:
        return sorted(file for file in folder.rglob("*") if file.is_file())

    def test_second_load_decodes_nothing(self, root: Path, cache: Path, decodings: list[object]) -> None:
        before = self.files(root)
        first = load_images("folder", root)
        (file,) = self.files(cache)
        assert file.suffix == ".safetensors"
        assert first.notes == (f"decoded images are cached in {file}",)
        second = load_images("folder", root, limit_train=4)
        assert len(decodings) == 1
        assert second.notes == ()
        assert self.files(root) == before  # nothing is left in the user's folder
        assert load_images("folder", root).digest == first.digest

    def test_what_was_loaded_can_be_written_to(self, root: Path) -> None:
        first = load_images("folder", root)
        load_images("folder", root).train.images.zero_()
        assert load_images("folder", root).digest == first.digest

    def test_sizes_are_kept_apart(self, root: Path, cache: Path, decodings: list[object]) -> None:
        for size in (None, (4, 4), (4, 5), None, (4, 4)):
            assert load_images("folder", root, source_size=size).native == (size or (6, 8))
        assert len(decodings) == len(self.files(cache)) == 3

    def test_any_change_is_noticed(self, root: Path, decodings: list[object]) -> None:
        load_images("folder", root)
        os.utime(root / "train/cat/0.png", (1, 1))
        load_images("folder", root)
        os.rename(root / "train/cat/0.png", root / "train/cat/00.png")
        load_images("folder", root)
        save(root / "train/cat/9.png", pixels(80))
        load_images("folder", root)
        assert len(decodings) == 4

    def test_change_behind_the_same_size_and_time_is_noticed(self, root: Path) -> None:
        path = save(root / "train/cat/x.bmp", pixels(80))
        first, stat = load_images("folder", root), path.stat()
        save(path, pixels(81))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert load_images("folder", root).digest != first.digest

    @pytest.mark.parametrize("damage", ["cut", "empty", "junk", "flip", "count"])
    def test_damaged_cache_is_rebuilt(self, root: Path, cache: Path, decodings: list[object], damage: str) -> None:
        save(root / "train/cat/gray.png", pixels(30)[..., 0])
        first = load_images("folder", root)
        (file,) = self.files(cache)
        content = file.read_bytes()
        flip = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]  # one bit of one pixel
        count = content.replace(b'RGB\\": 1', b'RGB\\": 7')  # in the header
        file.write_bytes({"cut": content[:-9], "empty": b"", "junk": b"x" * 500, "flip": flip, "count": count}[damage])
        assert file.read_bytes() != content
        again = load_images("folder", root)
        assert (again.digest, again.notes, len(decodings)) == (first.digest, first.notes, 2)
        load_images("folder", root)
        assert len(decodings) == 2
        assert self.files(cache) == [file]  # and no temporary file

    def test_cache_that_cannot_be_written(self, root: Path, cache: Path) -> None:
        cache.write_text("a file where the folder should be")
        (note,) = load_images("folder", root).notes
        assert note.startswith("decoded images are not cached: ")
        assert str(cache) in note

    def test_write_that_fails_halfway(self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(images, "save_file", full)
        assert "No space left" in load_images("folder", root).notes[0]
        assert self.files(cache) == []

    def test_no_home(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless(path: Path) -> Path:
            if str(path).startswith("~"):
                raise RuntimeError("Could not determine home directory.")
            return path

        monkeypatch.delenv("VIT2DPE_CACHE")
        monkeypatch.setattr(Path, "expanduser", homeless)
        assert "not cached: Could not determine home directory." in load_images("folder", root).notes[0]

    def test_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert images.cache_dir() == tmp_path / "cache"
        monkeypatch.delenv("VIT2DPE_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert images.cache_dir() == tmp_path / ".cache/vit2dpe"


class TestCifar10:
    @pytest.fixture
    def batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """CIFAR-10's own files with 4 images a batch, as torchvision finds them after a download."""
        folder = tmp_path / "cifar" / CIFAR10.base_folder
        folder.mkdir(parents=True)

        def write(name: str, content: dict[str, object]) -> str:
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        lists = []
        for names in (CIFAR10.train_list, CIFAR10.test_list):
            lists.append([])
            for name, _ in names:
                rows = np.random.default_rng(len(name)).integers(0, 256, (4, 3072), dtype=np.uint8)
                lists[-1].append([name, write(name, {"data": rows, "labels": [3, 1, 4, 1]})])
        md5 = write("batches.meta", {"label_names": [*"abcdefghij"]})
        monkeypatch.setattr(CIFAR10, "train_list", lists[0])
        monkeypatch.setattr(CIFAR10, "test_list", lists[1])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
        return folder

    def test_contents(self, batches: Path) -> None:
        loaded = load_images("cifar10", batches.parent)
        assert (len(loaded.train), len(loaded.test), loaded.native) == (20, 4, (32, 32))
        assert loaded.classes == tuple("abcdefghij")
        assert (loaded.train.images.dtype, loaded.train.labels.dtype) == (torch.uint8, torch.int64)
        assert loaded.test.labels.tolist() == [3, 1, 4, 1]
        stored = pickle.loads((batches / "test_batch").read_bytes())["data"].reshape(4, 3, 32, 32)
        assert np.array_equal(loaded.test.images.numpy(), stored)

    def test_no_network(self, batches: Path) -> None:
        (batches / "data_batch_1").unlink()
        with pytest.raises(DataError) as caught:
            load_images("cifar10", batches.parent)
        for part in ("torchvision.datasets.CIFAR10", str(batches.parent), "refused", "--data folder --root"):
            assert part in str(caught.value)

    def test_altered_batch_is_not_opened(self, batches: Path, tmp_path: Path) -> None:
        sentinel = tmp_path / "opened"

        class Payload:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(sentinel),)

        (batches / "test_batch").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(DataError, match="CIFAR-10"):
            load_images("cifar10", batches.parent)
        assert not sentinel.exists()

    def test_cache_folder_is_the_default(self, batches: Path, cache: Path) -> None:
        cache.mkdir()
        os.rename(batches.parent, cache / "cifar10")
        assert len(load_images("cifar10").train) == 20

    def test_source_size_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="source_size"):
            load_images("cifar10", source_size=(16, 16))


class TestBatch:
    def test_identity_is_exact(self) -> None:
        batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert torch.equal(resize(batch, (16, 16)), batch.float() / 255)
        values = torch.rand(2, 3, 5, 7, dtype=torch.float64)
        assert resize(values, (5, 7)) is values

    @pytest.mark.parametrize("size", [(4, 6), (24, 40), (8, 3), (1, 1)])
    def test_equals_torchvision(self, size: tuple[int, int]) -> None:
        batch = torch.from_numpy(np.stack([pixels(s, 9, 13) for s in range(2)])).permute(0, 3, 1, 2)
        ours = resize(batch, size)
        theirs = TF.resize(batch.float() / 255, list(size), TF.InterpolationMode.BICUBIC, antialias=True)
        assert torch.allclose(ours, theirs.clamp(0, 1), atol=1e-6)
        assert ours.shape == (2, 3, *size)

    def test_overshoot_is_clamped(self) -> None:
        edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        edge[..., 4:] = 255
        large = resize(edge, (32, 32))
        assert (large.min(), large.max()) == (0, 1)

    def test_rows_before_columns(self) -> None:
        assert resize(torch.zeros(1, 1, 4, 4), (2, 6)).shape == (1, 1, 2, 6)

    def test_normalize(self, root: Path) -> None:
        loaded = load_images("folder", root)
        x = normalize(loaded.train.images.double() / 255, loaded.mean, loaded.std)
        assert x.mean((0, 2, 3)).abs().max() < 1e-14
        assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-14
        assert normalize(torch.zeros(1, 3, 2, 2), loaded.mean, loaded.std).dtype == torch.float32

    def test_channels_must_match(self) -> None:
        with pytest.raises(ConfigError, match="1 channels, mean 3 and std 3"):
            normalize(torch.zeros(1, 1, 2, 2), (0, 0, 0), (1, 1, 1))


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match="unknown data source 'digit'; did you mean 'digits'"):
        load_images("digit")
    assert {"digits", "folder", "cifar10", "cifar100", "tar", "hf"} == set(SOURCES)


def test_import_is_light() -> None:
    assert loaded_modules("import vit2dpe.data.datasets", {"timm", "sklearn", "torchvision", "matplotlib"}) == []


class TestRealData:
    def unpack(self, archive: Path, target: Path, classes: int, each: int) -> Path:
        """The first `each` images of the first `classes` of both splits, written by hand; returns the root."""
        kept: dict[tuple[str, str], int] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                top, *rest = Path(member.name).parts
                if not member.isfile() or len(rest) != 3:
                    continue
                part, name, _ = rest
                if (part, name) not in kept and sum(key[0] == part for key in kept) == classes:
                    if len(kept) == 2 * classes and min(kept.values()) == each:
                        break
                    continue
                if kept.setdefault((part, name), 0) < each:
                    kept[part, name] += 1
                    (target / top / part / name).mkdir(parents=True, exist_ok=True)
                    (target / member.name).write_bytes(tar.extractfile(member).read())
        return target / top

    def test_cifar10(self, shared_data: Path, tmp_path: Path) -> None:
        loaded = load_images("folder", self.unpack(shared_data / "cifar10.tar.gz", tmp_path, classes=3, each=20))
        assert loaded.classes == ("airplane", "automobile", "bird")
        assert (len(loaded.train), len(loaded.test), loaded.native) == (60, 60, (32, 32))
        assert max(abs(m - known) for m, known in zip(loaded.mean, (0.49, 0.48, 0.45), strict=True)) < 0.1
        with Image.open(tmp_path / "cifar10/test/bird/0019.jpg") as last:
            assert np.array_equal(loaded.test.images[-1].permute(1, 2, 0).numpy(), np.asarray(last))
        assert len(loaded.notes) == 1  # where the cache is, and nothing to complain of

    def test_tiny_imagenet(self, shared_data: Path, tmp_path: Path) -> None:
        loaded = load_images("folder", self.unpack(shared_data / "tiny-imagenet-50.tar.gz", tmp_path, 2, 50))
        assert (len(loaded.train), len(loaded.test), loaded.native) == (100, 100, (64, 64))
        gray = [note for note in loaded.notes if note.startswith("grayscale images converted to RGB: ")]
        assert len(gray) == 1

    def test_photos(self, shared_data: Path, tmp_path: Path) -> None:
        """Native sizes, one of them grayscale."""
        files = sorted((shared_data / "photos").glob("*.JPEG"))
        assert len(files) == 24
        for index, file in enumerate(files):
            target = tmp_path / "photos" / ("train", "val")[index % 2] / f"class{index // 2 % 2}" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
        refused(tmp_path / "photos", "differ in size", "source_size")
        loaded = load_images("folder", tmp_path / "photos", source_size=(96, 160))
        assert (len(loaded.train), len(loaded.test), loaded.native) == (12, 12, (96, 160))
        assert "grayscale images converted to RGB: 1" in loaded.notes
        first = sorted((tmp_path / "photos/train/class0").iterdir())[0]
        with Image.open(first) as photo:
            expected = ImageOps.fit(photo.convert("RGB"), (160, 96), Image.Resampling.BICUBIC)
        assert np.array_equal(loaded.train.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
