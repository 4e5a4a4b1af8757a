"""Image files to one uint8 tensor: a strict decoder, and a cache of what it made.

A file that cannot be read whole stops the load and is named; none is dropped, guessed at or replaced by another.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
# Named, because Pillow would otherwise go by content alone and hand a PostScript file called x.jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000
DECODER = 1  # part of every cache key: raise it when the same file decodes to other pixels

_ORIENTATION = 0x0112  # EXIF tag
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MODES = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "I": "16-bit", "P": "palette", "PA": "palette"}


def cache_dir() -> Path:
    """Where decoded images are kept: $VIT2DPE_CACHE, else ~/.cache/vit2dpe. Not created here."""
    return Path(os.environ.get("VIT2DPE_CACHE") or "~/.cache/vit2dpe").expanduser()


def load_files(root: Path, names: Sequence[str], size: tuple[int, int] | None = None) -> tuple[Tensor, list[str]]:
    """Decode files, or take them from the cache if none has changed since.

    Args:
        root: the folder that `names` are relative to.
        names: N files; at least one.
        size: (H, W) to bring every image to; None: they all have one size already.

    Returns:
        images uint8 (N, 3, H, W) in the order of `names`, and what there is to say about them.

    Raises:
        DataError: for a file that cannot be read, and for two sizes where `size` is None.
        ConfigError: for a size that is none.
    """
    if size is not None and min(size) < 1:
        raise ConfigError(f"source_size must be two positive numbers (rows, columns), got {size}")
    try:
        cache = cache_dir() / f"{fingerprint(root, names, size)}.safetensors"
    except RuntimeError as error:  # no home folder
        return _noted(*decode_all(root, names, size), f"decoded images are not cached: {error}")
    found = _read_cache(cache)
    if found is not None:
        return _noted(*found)
    images, counts = decode_all(root, names, size)
    return _noted(images, counts, _write_cache(cache, images, counts))


def fingerprint(root: Path, names: Sequence[str], size: tuple[int, int] | None) -> str:
    """A key that changes with any file, with `size` and with the decoder; reads no file's content.

    The time of the last change of the inode (ctime) is part of it: unpacking another archive over the same folder can
    restore names, sizes and modification times, and would otherwise serve the old pixels.
    """
    facts = [repr((DECODER, PIL.__version__, size))]
    for name in names:
        try:
            stat = os.stat(f"{root}/{name}")
        except OSError as error:
            raise _unreadable(root / name, error) from error
        facts.append(f"{name}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}")
    return hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()


def decode_all(root: Path, names: Sequence[str], size: tuple[int, int] | None) -> tuple[Tensor, dict[str, int]]:
    """uint8 (N, 3, H, W), and how many images were converted in which way. Raises DataError as `load_files` does."""
    first, _ = decode(root / names[0], size)
    images = torch.empty(len(names), 3, *first.shape[:2], dtype=torch.uint8)
    planes = images.numpy()

    def part(start: int, length: int = 256) -> Counter[str]:
        counts: Counter[str] = Counter()
        for index, name in enumerate(names[start : start + length], start):
            image, kinds = decode(f"{root}/{name}", size)
            if image.shape != first.shape:
                raise DataError(
                    f"the images differ in size: {root / names[0]} is {_size(first)}, {root / name} is {_size(image)} "
                    "(rows x columns); pass source_size=(rows, columns) to resize and centre-crop all of them"
                )
            planes[index] = image.transpose(2, 0, 1)
            counts.update(kinds)
        return counts

    # Threads: Pillow lets go of the interpreter while it decodes, and the results need no copy between processes.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        counts = sum(pool.map(part, range(0, len(names), 256)), Counter())
    return images, dict(sorted(counts.items()))


def decode(path: str | Path, size: tuple[int, int] | None = None) -> tuple[np.ndarray, list[str]]:
    """One file as RGB, upright, transparency composited on black, 16 bits scaled to 8.

    `size` (H, W): resize (bicubic, antialiased) so that the image just covers it, then crop the centre.

    Returns:
        uint8 (H, W, 3), and the conversions it took.

    Raises:
        DataError: for a file that is missing, damaged, no image, or has more than 50 megapixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
            if image.format == "PNG":
                _check_png(path)
            return as_rgb(image, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"the image {path} has more than {MAX_PIXELS // 10**6} megapixels ({error}): it was not decoded; "
            "make it smaller or delete it"
        ) from error
    except Exception as error:  # damage surfaces as whatever a decoder stumbles over: OSError, SyntaxError, IndexError
        raise _unreadable(path, error) from error


def as_rgb(image: Image.Image, size: tuple[int, int] | None = None) -> tuple[np.ndarray, list[str]]:
    """An opened image as `decode` gives it."""
    rgb, kinds = _to_rgb(image)
    if size is not None:
        rgb = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(rgb), kinds


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
    """Pillow decodes a PNG without looking at its checksums or its end."""
    data = Path(path).read_bytes()
    Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    if _PNG_END not in data:
        raise OSError("the end of the file is missing")


def _read_cache(path: Path) -> tuple[Tensor, dict[str, int]] | None:
    """What was written there; None where there is nothing, or anything but what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            images, facts = file.get_tensor("images"), file.metadata()
        if facts["check"] != _check(images, facts["counts"]):
            return None
        return images, json.loads(facts["counts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write_cache(path: Path, images: Tensor, counts: dict[str, int]) -> str:
    """Write under another name, then rename: a reader sees all of it or nothing. A full disk is no reason to stop."""
    facts = json.dumps(counts)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": images}, temporary, {"counts": facts, "check": _check(images, facts)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        return f"decoded images are not cached: {error}"
    finally:
        with suppress(OSError):  # renamed, or never made
            temporary.unlink()
    return f"decoded images are cached in {path}"


def _check(images: Tensor, counts: str) -> str:
    head = f"{images.dtype} {tuple(images.shape)} {counts}"
    return f"{zlib.crc32(images.numpy().data, zlib.crc32(head.encode())):08x}"


def _noted(images: Tensor, counts: dict[str, int], *notes: str) -> tuple[Tensor, list[str]]:
    return images, [*(f"{kind}: {count}" for kind, count in counts.items()), *notes]


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _unreadable(path: str | Path, error: Exception) -> DataError:
    return DataError(f"cannot read the image {path}: {error}; repair or delete it (no other image takes its place)")
