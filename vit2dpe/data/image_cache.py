"""Reads image files into one uint8 tensor, through a cache of decoded images.

A file that cannot be read completely stops the load and is named. With `skip` it is left out instead, counted and
listed with its reason; it is never replaced by another image.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, DataError, TrainingError
from ..files import cache_dir, write_atomically
from ..spec import Size
from .decode import DECODER, Unreadable, decode, size_of

Reasons = dict[int, str]  # why a file is unreadable, by its index


class SizesDiffer(DataError):
    """Images of several sizes, and no size to bring them to."""


class Decoded(NamedTuple):
    """Decoded files.

    Args:
        images: uint8 (N, 3, H, W) of the readable files, in their order.
        counts: number of images by kind of conversion.
        unreadable: the reasons for the other files.
    """

    images: Tensor
    counts: dict[str, int]
    unreadable: Reasons


def load_files(
    root: Path, names: Sequence[str], size: Size | None = None, *, skip: bool = False, fit: str = "crop"
) -> tuple[Tensor, list[str], Reasons]:
    """Decode files, or read them from the cache if none has changed since.

    Args:
        root: the folder that `names` are relative to.
        names: N files; at least one.
        size: (H, W) to bring every image to; None: they all have one size already.
        skip: leave out files that cannot be read.
        fit: how they are brought to `size`, see `decode`.

    Returns:
        images uint8 (N, 3, H, W) in the order of `names`, notes for the user, and the reasons for those that were left
        out.

    Raises:
        Unreadable: for a file that cannot be read, unless `skip`.
        SizesDiffer: a DataError, for two sizes where `size` is None.
        DataError: if no file can be read.
        ConfigError: for a size that is not positive.
    """
    check_size(size)
    try:
        cache = cache_dir() / f"{fingerprint(root, names, size, skip, fit)}.safetensors"
    except RuntimeError as error:  # no home folder
        return _noted(decode_all(root, names, size, skip, fit), f"decoded images are not cached: {error}")
    cached = _read_cache(cache)
    if cached is not None:
        for index, reason in cached.unreadable.items() if not skip else ():
            raise Unreadable(root / names[index], reason)
        return _noted(cached)
    decoded = decode_all(root, names, size, skip, fit)
    return _noted(decoded, _write_cache(cache, decoded))


def find_unreadable(root: Path, names: Sequence[str], size: Size | None = None) -> Reasons:
    """The reasons for files that cannot be read. All files are decoded for it, once: the result is cached until one
    changes.

    Raises:
        ConfigError: for a size that is not positive.
    """
    check_size(size)
    try:
        cache = cache_dir() / f"{fingerprint(root, names, size, skip=True)}.unreadable.json"
    except RuntimeError:  # no home folder
        return _decode_each(root, names, size, lambda *_: None, skip=True)[1]
    with suppress(OSError, ValueError, AttributeError):
        return {int(index): str(reason) for index, reason in json.loads(cache.read_text()).items()}
    reasons = _decode_each(root, names, size, lambda *_: None, skip=True)[1]
    with suppress(TrainingError):  # a full disk does not stop the load
        write_atomically(cache, json.dumps(reasons).encode())
    return reasons


def check_size(size: Size | None) -> None:
    if size is not None and min(size) < 1:
        raise ConfigError(f"source_size must be two positive numbers (rows, columns), got {size}")


def fingerprint(root: Path, names: Sequence[str], size: Size | None, skip: bool = False, fit: str = "crop") -> str:
    """A cache key that changes with any file, with `size`, `fit` and the decoder; reads no file's content.

    The time of the last change of the inode (ctime) is part of it: unpacking another archive over the same folder can
    restore names, sizes and modification times, and would otherwise serve the old pixels.

    Raises:
        Unreadable: for a file that is not there, unless `skip`.
    """
    facts = [repr((DECODER, PIL.__version__, size, *([] if fit == "crop" else [fit])))]
    for name in names:
        try:
            stat = os.stat(f"{root}/{name}")
            facts.append(f"{name}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}")
        except OSError as error:
            if not skip:
                raise Unreadable(root / name, error) from error
            facts.append(f"{name}\0")
    return hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()


def first_readable(
    root: Path, names: Sequence[str], size: Size | None, skip: bool = False, fit: str = "crop"
) -> tuple[str, np.ndarray]:
    """The name of the first file that can be read, and its pixels (H, W, 3).

    Raises:
        Unreadable: if the first one cannot be, unless `skip`.
        DataError: if none can be.
    """
    why = ""
    for name in names:
        try:
            return name, decode(f"{root}/{name}", size, fit)[0]
        except Unreadable as error:
            if not skip:
                raise
            why = why or f"; the first, {name}: {error.reason}"
    raise DataError(f"not one of {len(names)} images under {root} can be read{why}")


def check_one_size(root: Path, names: Sequence[str], native: np.ndarray) -> None:
    """Refuse images of several sizes, of which none has been decoded but one; from the heads of 2,048 files.

    Raises:
        SizesDiffer: naming one that is of another size.
    """
    for name in names[:: -(-len(names) // 2048)]:
        with suppress(Unreadable):
            if (size := size_of(f"{root}/{name}")) != native.shape[:2]:
                raise SizesDiffer(
                    f"the images differ in size: {root / name} is {size[0]}x{size[1]}, others are {_size(native)} "
                    "(rows x columns); --data.source_size brings them to one"
                )


def decode_all(root: Path, names: Sequence[str], size: Size | None, skip: bool = False, fit: str = "crop") -> Decoded:
    """Decode files, in threads. Raises as `load_files` does."""
    reference, first = first_readable(root, names, size, skip, fit)
    images = torch.empty(len(names), 3, *first.shape[:2], dtype=torch.uint8)
    planes = images.numpy()

    def keep(index: int, image: np.ndarray) -> None:
        if image.shape != first.shape:
            raise SizesDiffer(
                f"the images differ in size: {root / reference} is {_size(first)}, {root / names[index]} is "
                f"{_size(image)} (rows x columns); pass source_size=(rows, columns) to bring all of them to it, by "
                "fit"
            )
        planes[index] = image.transpose(2, 0, 1)

    counts, reasons = _decode_each(root, names, size, keep, skip, fit)
    kept = [index for index in range(len(names)) if index not in reasons]
    for target, index in enumerate(kept):
        if target < index:  # within the tensor: another one would be as large again
            planes[target] = planes[index]
    return Decoded(images[: len(kept)], counts, reasons)


def _decode_each(
    root: Path,
    names: Sequence[str],
    size: Size | None,
    keep: Callable[[int, np.ndarray], None],
    skip: bool,
    fit: str = "crop",
) -> tuple[dict[str, int], Reasons]:
    """Call `keep(index, pixels)` for every readable file. Returns counts of conversions, and reasons for the others."""

    def part(start: int, length: int = 256) -> tuple[Counter[str], Reasons]:
        counts: Counter[str] = Counter()
        reasons: Reasons = {}
        for index, name in enumerate(names[start : start + length], start):
            try:
                image, kinds = decode(f"{root}/{name}", size, fit)
            except Unreadable as error:
                if not skip:
                    raise
                reasons[index] = error.reason
                continue
            keep(index, image)
            counts.update(kinds)
        return counts, reasons

    counts: Counter[str] = Counter()
    reasons: Reasons = {}
    # Threads: Pillow releases the interpreter's lock while it decodes, and results need no copy between processes.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for more, wrong in pool.map(part, range(0, len(names), 256)):
            counts += more
            reasons |= wrong
    return dict(sorted(counts.items())), reasons


def _read_cache(path: Path) -> Decoded | None:
    """The cached images; None if there are none, or the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            images, facts = file.get_tensor("images"), file.metadata()
        unreadable = facts.get("unreadable", "")
        if facts["check"] != _check(images, facts["counts"] + unreadable):
            return None
        reasons = {int(number): reason for number, reason in json.loads(unreadable or "{}").items()}
        return Decoded(images, json.loads(facts["counts"]), reasons)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write_cache(path: Path, decoded: Decoded) -> str:
    """Write under another name, then rename; returns a note. A full disk does not stop the load."""
    images, counts = decoded.images, json.dumps(decoded.counts)
    unreadable = json.dumps(decoded.unreadable) if decoded.unreadable else ""
    facts = dict(counts=counts, check=_check(images, counts + unreadable))
    facts |= dict(unreadable=unreadable) if unreadable else {}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": images}, temporary, facts)
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


def _noted(decoded: Decoded, *notes: str) -> tuple[Tensor, list[str], Reasons]:
    """The return value of `load_files`."""
    return decoded.images, [*(f"{kind}: {n}" for kind, n in decoded.counts.items()), *notes], decoded.unreadable


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
