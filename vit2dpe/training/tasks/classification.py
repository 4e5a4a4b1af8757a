"""Image classification: batches, augmentation, loss and evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.augment import Share, erase, mix, resized_crop, shift_and_flip
from ...data.datasets import Images, normalize
from ...data.loader import Feed, stream
from ...data.rand_augment import rand, trivial
from ...data.settings import AugmentConfig
from ...data.splits import FileSplit, Split, resize, resized
from ...data.transfer import onto
from ...resolution.sweep import evaluate
from ...seeding import derive_seed, generator
from ...spec import Plain, Size
from ..distributed import ALONE, World, sum_over_ranks
from ..task import BalancedOrder, Batch, batch_indices, count_steps, describe_data
from .items import SeededTask

PLAIN = AugmentConfig(label_smoothing=0.0)


@dataclass
class ImageTask(SeededTask):
    """Classification of images.

    Args:
        data: images at their native size.
        train_size: (H, W) of training images.
        batch_size: images of a step, over all ranks; the last step of an epoch has the rest.
        augment: what happens to training images.
        workers: processes that decode images which are not in memory (`data.loader`).
        balanced: draw every class equally often in an epoch (`task.BalancedOrder`).
        drop_last: leave the rest out (`task.count_steps`).
    """

    data: Images
    train_size: Size
    batch_size: int
    augment: AugmentConfig = PLAIN
    workers: int | None = None
    balanced: bool = False
    drop_last: bool | None = False
    best: tuple[str, str] | None = field(init=False)
    train: Split | FileSplit = field(init=False)
    feed: Feed = field(init=False, repr=False, compare=False)
    order: BalancedOrder | None = field(init=False, repr=False, compare=False)
    steps_per_epoch: int = field(init=False)
    unit: str = "images"

    def __post_init__(self) -> None:
        self.order = BalancedOrder(self.data.train.labels, self.seed) if self.balanced else None
        drawn = len(self.data.train) if self.order is None else len(self.order)
        self.steps_per_epoch = count_steps(drawn, self.batch_size, self.world, self.drop_last)
        self.train = self.data.train.resized(self.train_size)
        self.feed = Feed(self.train, lambda *at: self._share(*at)[1], lambda: self.steps_per_epoch, self.workers)
        self.best = (f"{next(iter(self.data.held_out))}_top1", "max")

    def batch(self, epoch: int, step: int) -> Batch:
        share, index = self._share(epoch, step)
        images = self._augmented(onto(self.feed(epoch, step), self.device), epoch, step, share)
        images = normalize(images.float() / 255, self.data.mean, self.data.std)
        labels = onto(self.train.labels[index], self.device)
        batch = dict(images=images, labels=labels, index=index)
        augment = self.augment
        if augment.erase:
            batch["images"] = erase(images, augment.erase, self._draws(epoch, step, "erase"), share=share)
        if augment.mixup or augment.cutmix:
            weights = dict(mixup=augment.mixup, cutmix=augment.cutmix)
            seed = derive_seed(self.seed, epoch, step, "mix")
            classes = len(self.data.classes)
            batch["images"], batch["labels"] = mix(batch["images"], labels, classes, seed, **weights, share=share)
        return batch

    def close(self) -> None:
        self.feed.close()

    def _share(self, epoch: int, step: int) -> tuple[Share, Tensor]:
        """This rank's share of the batch, and the indices of its images."""
        if self.order is None:
            order = batch_indices(len(self.train), self.batch_size, self.seed, epoch, step)
        else:
            order = self.order.batch(self.batch_size, epoch, step)
        share = Share(len(order), self.world.share(len(order)))
        return share, order[share.samples]

    def _augmented(self, images: Tensor, epoch: int, step: int, share: Share) -> Tensor:
        """uint8 to uint8: crop or shift, policy, size."""
        augment = self.augment
        flip, draws = bool(augment.flip), self._draws(epoch, step, "augment")
        if augment.crop is not None:
            images = resized_crop(images, self.train_size, augment.crop, flip, draws, share=share)
        else:
            images = shift_and_flip(images, augment.shift or 0, flip, draws, share=share)
        name, options = augment.policy
        if name != "none":
            apply = trivial if name == "trivial" else rand
            images = apply(images, self._draws(epoch, step, "policy"), **options, share=share)
        if sizes := augment.train_sizes:
            chosen = int(torch.randint(len(sizes), (1,), generator=self._draws(epoch, step, "size")))
            images = resized(images, sizes[chosen])
        return images

    def _draws(self, epoch: int, step: int, purpose: str) -> torch.Generator:
        return generator(self.seed, epoch, step, purpose)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        logits, smoothing = model(batch["images"]), self.augment.label_smoothing
        return F.cross_entropy(logits.float(), batch["labels"], label_smoothing=smoothing), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Top-1, top-5 where there are more than five classes, and loss, of every held-out split."""
        top = (1, 5) if len(self.data.classes) > 5 else (1,)
        names, numbers = (*(f"top{k}" for k in top), "loss"), dict[str, float]()
        for split in self.data.held_out:
            where = (self.world, split, self.workers, self.device)
            batches = evaluation_batches(self.data, self.train_size, 256, *where)
            score = evaluate(model, batches, top, least=int(self.world.size == 1))
            if self.world.size > 1:
                totals = [score["n"], *(score["n"] * score[name] for name in names)]
                n, *sums = sum_over_ranks(totals, self.world)
                score = {name: value / n for name, value in zip(names, sums, strict=True)}
            numbers |= {f"{split}_{name}": score[name] for name in names}
        return numbers

    def describe(self) -> dict[str, Plain]:
        return describe_data("classification", self.data, **self.data.about, train_size=list(self.train_size))


def evaluation_batches(
    data: Images,
    size: Size | None = None,
    batch: int = 256,
    world: World = ALONE,
    split: str = "test",
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images of a held-out split in order, at their native size or at `size`.

    They go to the device as uint8, and are resized there; labels stay. A rank has its own part of them, in as many
    batches as every other rank: sharded models meet in each forward pass.
    """
    held = data.held_out[split]
    count = len(held)
    cuts = [slice(start, start + batch) for start in range(0, count, batch)]
    if world.size > 1:
        own, batches = world.share(count), math.ceil(math.ceil(count / world.size) / batch)
        parts = [World(i, batches).share(own.stop - own.start) for i in range(batches)]
        cuts = [slice(own.start + part.start, own.start + part.stop) for part in parts]
    everything = torch.arange(count)
    for cut, images in zip(cuts, stream(held, (everything[cut] for cut in cuts), workers), strict=True):
        height, width = images.shape[-2:]
        images = resize(onto(images, device), size or (height, width))
        yield normalize(images, data.mean, data.std), held.labels[cut]
