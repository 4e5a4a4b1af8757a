"""Reads one image file as RGB, strictly: a file that cannot be read completely is refused by name, never guessed at."""

from __future__ import annotations

import errno
import importlib
import io
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError, unknown
from ..spec import Size

# Named, because Pillow would otherwise go by content alone and hand a PostScript file called x.jpg to Ghostscript. What
# begins with no number of its own, such as TGA, is read where the file's name says so.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
# What Pillow opens by another program, only identifies, or has no 8-bit picture of.
REFUSED = ("EPS", "PDF", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IPTC")
FITS = ("crop", "pad", "squash")
MAX_PIXELS = 50_000_000
DECODER = 1  # part of every cache key: raise it when the same file decodes to other pixels

# Errors of the system rather than of a file: too many open files, no memory, a disk that fails, no permission.
_NAMES = ("EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "ETIMEDOUT", "EACCES", "EPERM")
PASSING = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}  # not every system has all

_ORIENTATION = 0x0112  # EXIF tag
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MODES = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "I": "16-bit", "P": "palette", "PA": "palette"}


class Unreadable(DataError):
    """A file that is missing, damaged, no image, or too large to be decoded.

    Args:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: object) -> None:
        self.reason = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(
            f"cannot read the image {path}: {self.reason}; repair or delete it, or leave it out by unreadable=skip (no "
            "other image takes its place)"
        )


@cache
def suffixes() -> tuple[str, ...]:
    """The suffixes of the image files that the installed Pillow can open; .heic too, where pillow-heif is installed."""
    return tuple(_formats_by_suffix())


@cache
def _formats_by_suffix() -> dict[str, str]:
    with suppress(ImportError):  # as Pillow's own plugins are: it opens nothing until it is registered
        importlib.import_module("pillow_heif").register_heif_opener()
    known = Image.registered_extensions()  # loads every plugin
    known = {suffix: "JPEG" if name == "MPO" else name for suffix, name in known.items()}  # opened as what it begins as
    return {suffix: name for suffix, name in sorted(known.items()) if name in Image.OPEN and name not in REFUSED}


def _formats(path: str | Path) -> list[str]:
    """The formats that a file may have: those that are known by their content, and that of its name."""
    by_suffix = _formats_by_suffix()
    named = by_suffix.get(Path(path).suffix.lower())
    return [name for name in (*FORMATS, *([named] if named else [])) if name in Image.OPEN]


def check_fit(fit: str) -> None:
    """Refuse what is no way to bring images to one size."""
    if fit not in FITS:
        raise unknown("data.fit", fit, FITS)


def size_of(path: str | Path) -> Size:
    """(H, W) of an image as it is decoded, upright, from the head of its file.

    Raises:
        Unreadable: for a file that is no image.
    """
    try:
        with Image.open(path, formats=_formats(path)) as image:
            turned = image.getexif().get(_ORIENTATION, 1) > 4
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # as in `decode`
        raise Unreadable(path, error) from error


def decode(path: str | Path, size: Size | None = None, fit: str = "crop") -> tuple[np.ndarray, list[str]]:
    """One file as RGB, upright, transparency composited on black, 16 bits scaled to 8.

    Args:
        path: of the file.
        size: (H, W) to bring it to, bicubic, antialiased; None: it keeps its own.
        fit: crop (it just covers the size, and its centre is kept), pad (all of it just fits into the size, in the
            middle of black) or squash (each side is brought to the size by itself).

    Returns:
        uint8 (H, W, 3), and the conversions it took.

    Raises:
        Unreadable: a DataError, for a file that is missing, damaged, no image, or has more than 50 megapixels.
    """
    try:
        with Image.open(path, formats=_formats(path)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            if image.format == "PNG":
                _check_png(path)
            return as_rgb(image, size, fit)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(
            path, f"it has more than {MAX_PIXELS // 10**6} megapixels ({error}) and was not decoded: make it smaller"
        ) from error
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in PASSING:
            raise DataError(f"the system did not let {path} be read: {error}; the file may be whole") from error
        raise Unreadable(path, error) from error
    except Exception as error:  # damage surfaces as whatever a decoder stumbles over: SyntaxError, IndexError
        raise Unreadable(path, error) from error


def as_rgb(image: Image.Image, size: Size | None = None, fit: str = "crop") -> tuple[np.ndarray, list[str]]:
    """`decode` for an opened image."""
    rgb, kinds = _to_rgb(image)
    return np.asarray(rgb if size is None else fitted(rgb, size, fit)), kinds


def fitted(image: Image.Image, size: Size, fit: str) -> Image.Image:
    """An RGB image brought to (H, W) as `decode` says."""
    check_fit(fit)
    height, width = size
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    if fit == "squash":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    scale = min(width / image.width, height / image.height)
    inner = [max(1, round(side * scale)) for side in image.size]
    padded = Image.new("RGB", (width, height))  # black
    corner = (width - inner[0]) // 2, (height - inner[1]) // 2
    padded.paste(image.resize((inner[0], inner[1]), Image.Resampling.BICUBIC), corner)
    return padded


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    kinds = []
    if getattr(image, "is_animated", False):
        kinds.append("images of several frames, first one used")
    mode = image.mode.split(";")[0]
    if mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow opens a 16-bit PGM as "I"
        raise ValueError(f"pixels of mode {image.mode} have no defined white; save it with 8 or 16 bits")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        kinds.append("images turned upright by their EXIF orientation")
        image = ImageOps.exif_transpose(image)
    if mode not in ("RGB", "RGBA"):
        kinds.append(f"{_MODES.get(mode, mode)} images converted to RGB")
    if mode == "I":  # Pillow's own conversion clips at 255
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        kinds.append("images with transparency composited on black")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB"), kinds


def _check_png(path: str | Path) -> None:
    """Verify checksums and the end of a PNG, which Pillow does not when it decodes."""
    data = Path(path).read_bytes()
    Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    if _PNG_END not in data:
        raise OSError("the end of the file is missing")
