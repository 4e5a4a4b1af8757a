"""Settings of image data and of augmentation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..ranges import Count, Natural, NotNegative, Probability, Processes, Rate, Share
from ..spec import Plain, Settings, Size, Sizes, Term

CSV_ENDINGS = (".csv", ".tsv")
LADDER = (32, 48, 64, 96, 128, 160, 192, 224)  # sizes to train photos at


@dataclass(frozen=True)
class DataConfig(Settings):
    """Images: where they lie, how many, at which size.

    Args:
        name: digits (built in), cifar10, cifar100 (downloaded), folder (class folders, Tiny-ImageNet as it is
            downloaded), csv (paths and labels), tar (train.tar and val.tar under root), or hf:<name> (a Hugging Face
            dataset; hf:<name>?image=photo&label=breed chooses columns); default: csv or folder, by root; without root
            digits.
        root: where it lies.
        size: pixels of training images, 32 or 32x48 (height x width); default: their own, and where they differ the
            largest of 32, 48, 64, 96, 128, 160, 192, 224 that is not above their median short side.
        source_size: size that pictures of differing sizes are brought to once; default: the largest that is needed, as
            far as the pictures have it.
        fit: how pictures are brought to one size: crop (short side to size, centre kept), pad (long side to size, on
            black) or squash (aspect ratio lost).
        limit_train: use only so many training images, balanced over classes.
        limit_test: use only so many test images, balanced over classes.
        val_fraction: hold this part of every class of the training images out, drawn by run.seed; best/ and patience
            go by it instead of the test images. It also serves class folders that have no held-out split.
        cache: memory (decoded once and kept), none (files decoded as they are needed, by worker processes), or auto:
            memory where half of what is free is enough.
        workers: processes that decode, with cache none; 0: the training process itself; default: one a core, 8 at most.
        unreadable: error (an image file that cannot be read ends the run) or skip (it is left out beforehand, counted
            and listed in out/unreadable.jsonl; up to ten, or 1% of a split).
        balanced: draw every class equally often in an epoch, images of rare classes several times; an epoch stays as
            long as there are training images (rounded up to equal shares).
    """

    name: str | None = None
    root: str | None = None
    size: Size | None = None
    source_size: Size | None = None
    fit: str = "crop"
    limit_train: Count | None = None
    limit_test: Count | None = None
    val_fraction: Rate = 0.0
    cache: str = "auto"
    workers: Processes | None = None
    unreadable: str = "error"
    balanced: bool = False

    @property
    def source(self) -> str:
        """`name`, or what is understood where there is none."""
        return source_of(self.name, self.root)


def source_of(name: Plain, root: Plain) -> str:
    """The name of a source of images; without one csv or folder, by what `root` is, and digits without a root."""
    if name:
        return str(name)
    return "digits" if not root else "csv" if str(root).lower().endswith(CSV_ENDINGS) else "folder"


def patch_for(size: Size) -> int:
    """A patch side that makes 8 x 8 to 14 x 14 patches of an image of `LADDER`."""
    side = min(size)
    patch = 4 if side < 48 else 8 if side < 128 else 16
    return patch if all(length % patch == 0 for length in size) else 4


def count_files(root: str) -> int:
    """Files under a folder, or lines of a file under its header: about as many images; of very many not all."""
    path, files = Path(root).expanduser(), 0
    if path.is_dir():
        for _, _, names in os.walk(path, followlinks=True):
            files += len(names)
            if files > 20_000:  # enough to know that they are many, and an end to links that go round
                break
        return files
    try:
        with path.open("rb") as file:
            return max(0, sum(1 for _ in file) - 1)
    except OSError:  # said where it is read
        return 0


@dataclass(frozen=True)
class ViewConfig(Settings):
    """Random views of training images, drawn for each image by itself.

    Args:
        shift: random shift in pixels, edges reflected.
        flip: random horizontal flip.
        crop: instead of a shift, a random part of at least this share of the area, resized: 0.08 is ImageNet's custom,
            0.8 one for small images, 0.2 MAE's on ImageNet.
    """

    shift: Natural | None = None
    flip: bool | None = None
    crop: Share | None = None


@dataclass(frozen=True)
class AugmentConfig(ViewConfig):
    """Augmentation of training images, drawn for each image by itself.

    Args:
        policy: none, trivial (TrivialAugment), rand or rand(ops=2, magnitude=9) (RandAugment).
        erase: probability of erasing a random rectangle.
        mixup: α of mixup; 0: none.
        cutmix: α of cutmix; 0: none; with mixup a coin decides for each image.
        label_smoothing: of the cross-entropy.
        train_sizes: comma-separated sizes, of which each step draws one, such as 128,160,224 or 32,32x48.
    """

    policy: Term = Term("none", {})  # noqa: RUF009 - never written to
    erase: Probability = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    label_smoothing: Rate = 0.1
    train_sizes: Sizes | None = None
