"""An image file to RGB bytes, whatever its mode and size; damaged ones are refused with the path."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.pictures import pixels, refused, save
from vit2dpe.data.datasets import load_images
from vit2dpe.data.decode import decode
from vit2dpe.errors import ConfigError, DataError


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
