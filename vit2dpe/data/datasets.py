"""Image datasets: loading with subsets, validation split and statistics; normalisation. `sources` reads the files.

Legend: N images, B batch, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, unknown
from ..files import write_atomically
from ..spec import Plain, Size
from .decode import check_fit
from .identity import digest_of, digest_of_files
from .image_cache import SizesDiffer
from .photos import Survey, how_fitted, source_size, survey, train_size
from .settings import DataConfig
from .sources import CACHES, FILES, SOURCES, UNREADABLE, Reading
from .splits import FileSplit, Split, resize
from .transfer import onto

HELD_OUT = 0.2  # of every class, where there is no held-out split


@dataclass(frozen=True)
class Images:
    """An image dataset, in memory or on disk.

    Args:
        name: its source.
        classes: class names; a label is an index into them.
        train, test: the two splits, of one image size.
        mean, std: of every channel over the pixels of `train`, for images in [0, 1].
        digest: of all splits (`identity.digest_of`): equal digests, equal data.
        notes: remarks on the data for the user, a line each.
        val: the source's own validation split beside a test split, or the part of training that `val_fraction` held
            out; if there is one, it decides early stopping and `best/`.
        total: how many images the source has in `train`, in `test`, and in a `val` of its own, used or not.
        unreadable: the files that were left out because they cannot be read, with the reason.
        fit: how images were brought to one size, see `decode.decode`.
        digest_of_files: the same in memory and on disk (`identity.digest_of_files`); None where there are none.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | FileSplit
    test: Split | FileSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    notes: tuple[str, ...]
    val: Split | FileSplit | None = None
    total: Mapping[str, int] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    fit: str = "crop"
    digest_of_files: str | None = None

    @property
    def about(self) -> dict[str, Plain]:
        """What the checkpoint of a model has of them: classes, mean, std, and the fit where it is no crop."""
        about: dict[str, Plain] = dict(classes=list(self.classes), mean=list(self.mean), std=list(self.std))
        return about if self.fit == "crop" else about | {"fit": self.fit}

    @property
    def native(self) -> Size:
        """(H, W) of the stored images."""
        return self.train.size

    @property
    def held_out(self) -> dict[str, Split | FileSplit]:
        """The splits that are evaluated, by name; the first decides which weights are best."""
        return ({} if self.val is None else {"val": self.val}) | {"test": self.test}

    def as_recorded(self, about: Mapping[str, object]) -> Images:
        """With the mean and deviation of a training's record, which are estimated where images stay on disk."""
        mean, std = (about.get(name) for name in ("mean", "std"))
        if not (isinstance(mean, list | tuple) and isinstance(std, list | tuple) and len(mean) == len(self.mean)):
            return self
        return replace(self, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    @property
    def used(self) -> str:
        """How many images are used, of how many: `train 4990 of 5000, test 500 of 500`."""
        train = f"train {len(self.train)}" + ("" if self.val is None else f" and val {len(self.val)}")
        held_out = f"test {len(self.test)}" + (f" of {self.total['test']}" if "test" in self.total else "")
        return f"{train} of {self.total['train']}, {held_out}" if self.total else f"{train}, {held_out}"


def load_images(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    source_size: Size | None = None,
    fit: str = "crop",
    limit_train: int | None = None,
    limit_test: int | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    cache: str = "memory",
    unreadable: str = "error",
    labels: bool = True,
) -> Images:
    """Load an image dataset.

    Args:
        name: a key of `SOURCES`.
        root: where it lies; see the source.
        source_size: (H, W) that the images of a `folder` are brought to in decoding.
        fit: how: crop, pad or squash (`decode.decode`).
        limit_train, limit_test: keep a balanced part of this many images (`LabelledDataset.subsample`).
        val_fraction: hold out this part of every class of the training images, drawn by `seed`, as `Images.val`;
            where there is no held-out split, as `Images.test`.
        cache: memory: decoded once and kept; none: decoded from files each time, by worker processes (`loader`);
            auto: memory where it is large enough.
        unreadable: error: a file that cannot be read stops the load; skip: it is left out of its split, counted and
            listed with the reason (`Images.unreadable`). More than ten of a split that are more than 1% of it, and a
            class that is left without an image, stop the load all the same.
        labels: whether images without classes are refused.

    Without a held-out split a fifth of every class, drawn by `seed`, becomes `Images.test` (a tenth of images without
    classes). With val and test, val becomes `Images.val`.

    Raises:
        ConfigError: for an unknown name, or a setting that the source does not take.
        SizesDiffer: a DataError, for images of several sizes without `source_size`.
        DataError: for data that are missing, unreadable, not laid out as required, or without labels.
    """
    check_source(name, cache=cache, unreadable=unreadable, fit=fit)
    kind, _, what = name.partition(":")
    where, how = what or root, Reading(source_size, fit, cache, unreadable, labels)
    classes, train, test, notes, lost, val = SOURCES[kind](Path(where).expanduser() if where else None, how)
    if test is None and val is not None:
        test, val, lost = val, None, {{"val": "test"}.get(split, split): files for split, files in lost.items()}
    for split, part in (("train", train), ("test", test), ("val", val)):
        _check_labels(name, split, part, max(1, len(classes)))
    there = {"train": train, "test": test} | ({} if val is None else {"val": val})
    total = {split: len(part) + len(lost.get(split, ())) for split, part in there.items() if part is not None}
    for split, reasons in lost.items():
        if reasons:
            notes.append(f"images of {split} that cannot be read, left out: {len(reasons)} of {total[split]}")
    if val_fraction and val is not None:
        raise ConfigError(f"{name} has a split of its own for validation ({len(val)} images): leave out val_fraction")
    if test is None and not val_fraction:
        train, test = _made(train, classes, seed, notes)
    train = train if limit_train is None else train.subsample(limit_train)
    if val_fraction:
        train, val = train.hold_out(val_fraction, seed)
        note = f"validation: {len(val)} images, {val_fraction:g} of every class of train, by seed {seed}"
        notes.append(f"{note}; there is no other held-out split" if test is None else note)
        test, val = (val, None) if test is None else (test, val)
    elif val is not None and limit_test is not None:
        val = val.subsample(limit_test)
    if test is None:
        raise DataError(f"{name} has no held-out split")
    test = test if limit_test is None else test.subsample(limit_test)
    with ThreadPoolExecutor(1) as thread:  # hashing releases the interpreter's lock
        splits = [split for split in (train, test, val) if split is not None]
        digest = thread.submit(digest_of, *splits)
        mean, std = _statistics(train.sample())
        if isinstance(train, Split) and isinstance(test, Split) and (leaked := _shared(train, test)):
            notes.append(f"same image in train and test: {leaked}")
    unread = {file: reason for reasons in lost.values() for file, reason in reasons.items()}
    about = (digest.result(), tuple(notes), val, total, unread, fit, digest_of_files(*splits))
    return Images(name, classes, train, test, mean, std, *about)


def _made(
    train: Split | FileSplit, classes: tuple[str, ...], seed: int, notes: list[str]
) -> tuple[Split | FileSplit, Split | FileSplit]:
    """A held-out split of the training images: of every class its share."""
    counts = train.labels.bincount(minlength=len(classes))
    if alone := (counts == 1).nonzero()[:, 0].tolist():
        names = ", ".join(classes[i] for i in alone[:5]) if classes else "all"
        raise DataError(
            f"there is no held-out split, and {len(alone)} of {len(counts)} classes have one image, of which none can "
            f"be held out: {names}; two of every class are needed"
        )
    share = HELD_OUT if classes else HELD_OUT / 2
    rest, held_out = train.hold_out(share, seed)
    of = f"{share:g} of every class" if classes else f"{share:g}"
    notes.append(
        f"there is no held-out split: {len(held_out)} of {len(train)} images, {of}, are held out by seed {seed} and "
        f"measured, {len(rest)} are trained on"
    )
    return rest, held_out


def _check_labels(name: str, split: str, part: Split | FileSplit | None, classes: int) -> None:
    """Refuse labels that are no index of a class: public test sets have -1 where the label is kept secret."""
    if part is None or not bool((wrong := (part.labels < 0) | (part.labels >= classes)).any()):
        return
    first, images = int(wrong.nonzero()[0]), "training" if split == "train" else "held-out"
    raise DataError(
        f"{int(wrong.sum())} of the {len(part)} labels of {name}'s {images} images are none of its {classes} classes, "
        f"0 to {classes - 1}: the first is {int(part.labels[first])}, of image {first}; a split whose labels are kept "
        "secret (-1) cannot be measured on: give data whose held-out split has them"
    )


def load(data: DataConfig, seed: int = 0, *, labels: bool = True) -> Images:
    """`load_images` with these settings; images of several sizes are brought to the size of training."""
    return load_fitted(data, seed, lambda found: (data.size or train_size(found),), labels=labels)[0]


def load_fitted(
    data: DataConfig, seed: int, needed: Callable[[Survey], Sequence[Size]], *, labels: bool = True
) -> tuple[Images, Survey | None]:
    """`load_images` with these settings; images of several sizes are brought to one.

    Args:
        data: where they lie.
        seed: of a held-out split that is made.
        needed: the sizes that images of such sizes are used at.
        labels: whether images without classes are refused.

    Returns:
        the images, and what sizes they had, where they were brought to one that `data` does not name.
    """

    def at(size: Size | None) -> Images:
        return load_images(
            data.source,
            data.root,
            source_size=size,
            fit=data.fit,
            limit_train=data.limit_train,
            limit_test=data.limit_test,
            val_fraction=data.val_fraction,
            seed=seed,
            cache=data.cache,
            unreadable=data.unreadable,
            labels=labels,
        )

    if data.source_size is not None:
        return at(data.source_size), None
    found = survey(data, labels=labels) if data.name is None else None
    if found is None or not found.mixed:
        try:
            return at(None), None
        except SizesDiffer:
            if (found := survey(data, labels=labels)) is None:
                raise
    size = source_size(found, needed(found))
    images = at(size)
    return replace(images, notes=(how_fitted(found, size, data.fit), *images.notes)), found


def write_unreadable(folder: Path, unreadable: Mapping[str, str]) -> None:
    """Write `folder/unreadable.jsonl`: the files that were left out, with the reason. Without any, no file."""
    if not unreadable:
        (folder / "unreadable.jsonl").unlink(missing_ok=True)  # of an earlier run there
    else:
        lines = [json.dumps(dict(file=file, reason=reason)) for file, reason in unreadable.items()]
        write_atomically(folder / "unreadable.jsonl", "".join(f"{line}\n" for line in lines).encode())


def check_source(
    name: str,
    root: str | os.PathLike[str] | None = None,
    cache: str = "auto",
    unreadable: str = "error",
    fit: str = "crop",
) -> None:
    """Refuse, without reading any data, an unknown source and settings that it does not take."""
    kind, colon, what = name.partition(":")
    if kind not in SOURCES or (kind == "hf") != bool(what):
        if Path(name).expanduser().exists():
            raise ConfigError(f"{name} is no name of a source but there is such a file or folder: --root {name}")
        raise unknown("data source", name, [*(s for s in SOURCES if s != "hf"), "hf:<name>"])
    check_fit(fit)
    if fit != "crop" and kind not in (*FILES, "hf"):
        raise ConfigError(f"data.fit is of images of several sizes; those of {name} have one: leave it out")
    if colon and root:
        raise ConfigError(f"{name} says where the data are: leave out root, got {root}")
    if cache not in CACHES:
        raise unknown("data.cache", cache, CACHES)
    if cache == "none" and kind not in FILES:
        raise ConfigError(f"data.cache none is of files ({', '.join(FILES)}); {name} is in memory")
    if unreadable not in UNREADABLE:
        raise unknown("data.unreadable", unreadable, UNREADABLE)
    if unreadable == "skip" and kind not in FILES:
        kinds = ", ".join(FILES)
        raise ConfigError(f"data.unreadable skip is of files in class folders and their like ({kinds}), not of {name}")


def check_data(data: DataConfig) -> None:
    """Refuse settings that cannot work, without reading any data."""
    check_source(data.source, data.root, data.cache, data.unreadable, data.fit)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std of float images (B, C, H, W), by channel.

    Raises:
        ConfigError: if there are not C means and C stds.
    """
    if not len(mean) == len(std) == images.shape[1]:  # one channel would quietly broadcast to three
        raise ConfigError(f"images have {images.shape[1]} channels, mean {len(mean)} and std {len(std)} values")
    middle, width = onto(torch.tensor([tuple(mean), tuple(std)], dtype=images.dtype), images.device)[..., None, None]
    return (images - middle) / width


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of every channel in [0, 1], float64; from histograms of the 256 values, hence exact and quick."""
    value = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()
        mean = share @ value
        means.append(mean.item())
        # A constant channel says nothing: divided by 1 it stays at zero, by 0 it would be NaN.
        stds.append((share @ (value - mean).square()).sqrt().item() or 1.0)
    return tuple(means), tuple(stds)


def _shared(train: Split, test: Split) -> int:
    """Images of test whose pixels are those of an image of train."""
    seen = [image.tobytes() for image in test.images.numpy()]
    leaked = set(seen).intersection(image.tobytes() for image in train.images.numpy())
    return sum(image in leaked for image in seen)


__all__ = ["SOURCES", "Images", "Split", "load", "load_images", "normalize", "resize"]
