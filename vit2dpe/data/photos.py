"""Images of several sizes: what sizes there are, which one to train at, and which one to bring them to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ..errors import DataError
from ..spec import Size, show_size
from . import archives
from .decode import Unreadable, size_of
from .settings import LADDER, DataConfig
from .sources import FILES, lay_out

SAMPLE = 2048  # images that are looked at
_HOW = {
    "crop": "the short side is brought to {}, the centre kept",
    "pad": "the long side is brought to {}, the rest is black",
    "squash": "each is brought to {}, its aspect ratio is lost",
}


class Survey(NamedTuple):
    """Sizes of images.

    Args:
        short: the median of their short sides.
        smallest, largest: (H, W), by area.
        mixed: whether they are to be brought to one size: several sizes, or where `root` alone is given, the
            rectangles or large squares of one camera.
        images: how many of train there are, seen or not.
    """

    short: int
    smallest: Size
    largest: Size
    mixed: bool
    images: int


def survey(data: DataConfig, *, labels: bool = True) -> Survey | None:
    """The sizes of images as they lie there: of all, or of 2,048 of them, from the heads of their files.

    None for a source that has one size by its nature.
    """
    kind, _, what = data.source.partition(":")
    if kind not in FILES and kind != "hf":
        return None
    if kind == "hf":
        rows = archives.open_hub(what, labels=labels)
        train, count = rows.splits["train"], len(rows.splits["train"])
        return _of(
            [train[i][rows.image].size[::-1] for i in range(0, count, max(1, count // (SAMPLE // 4)))], count, data
        )
    layout = lay_out(kind, Path(data.root).expanduser() if data.root else None, labels)
    names = layout.files[:: -(-len(layout.files) // SAMPLE)]
    return _of(_sizes(layout.root, names), sum(map(len, layout.splits["train"].values())), data)


def _sizes(root: Path, names: Sequence[str]) -> list[Size]:
    """(H, W) of the files that can be read; what is wrong with the others is said where they are decoded."""

    def one(name: str) -> list[Size]:
        with suppress(Unreadable):
            return [size_of(f"{root}/{name}")]
        return []

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        sizes = [size for found in pool.map(one, names) for size in found]
    if not sizes:
        raise DataError(f"not one of {len(names)} images under {root} can be read, the first is {names[0]}")
    return sizes


def _of(sizes: Sequence[Size], count: int, data: DataConfig) -> Survey:
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    short = int(median(min(size) for size in sizes))
    (height, width), photos = by_area[-1], data.name is None
    mixed = len(set(sizes)) > 1 or (photos and (height != width or height > LADDER[-1]))
    return Survey(short, by_area[0], by_area[-1], mixed, count)


def sizes_for(found: Survey, patch: int | None = None) -> list[int]:
    """The sizes of `LADDER`, rising, that are not above the images' median short side and whole patches; at least the
    smallest of whole patches."""
    whole = [side for side in LADDER if patch is None or side % patch == 0] or [patch or LADDER[0]]
    return [side for side in whole if side <= found.short] or whole[:1]


def train_size(found: Survey, patch: int | None = None) -> Size:
    """The size to train at where none is given: that of the images, or for images of several sizes the largest of
    `LADDER` that is not above their median short side."""
    side = sizes_for(found, patch)[-1]
    return (side, side) if found.mixed else found.largest


def source_size(found: Survey, needed: Sequence[Size]) -> Size:
    """The size that images of several sizes are brought to: the largest that is needed, as far as they have it.

    Args:
        found: the images.
        needed: sizes that they are used at.
    """
    height, width = (max(sides) for sides in zip(*needed, strict=True))
    scale = min(1.0, found.short / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def how_fitted(found: Survey, size: Size, fit: str) -> str:
    """A note on images of several sizes that are brought to one."""
    return (
        f"images of {show_size(found.smallest)} to {show_size(found.largest)} (height x width), median short side "
        f"{found.short}: {_HOW[fit].format(show_size(size))} (data.fit {fit})"
    )
