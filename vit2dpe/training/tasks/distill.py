"""A model learns to answer as another one does, on images without labels, at several sizes.

    L = t² KL(teacher / t || student / t)  +  d of the patches behind the last norm  +  d of the pooled features
        +  30 · the mean over blocks of e of the patches + e of the leading tokens behind the block

    d = the mean over tokens of 1 - r,   e = the mean over tokens and channels of (student - teacher)² / σ²

The teacher sees each image at its own size, the student at a size that is drawn for each step; r is the correlation of
two features over their channels, the cosine after each was centred; σ is the standard deviation of a channel behind the
block in the teacher, over all tokens of 64 images. Where the grids differ, the teacher's features are resized to the
student's. A model without a classifier learns the features alone.

Sources: answers, arXiv 1503.02531; features, FitNets, arXiv 1412.6550, behind each block, TinyBERT, arXiv 1909.10351,
and of each patch, iBOT, arXiv 2111.07832. How ours differs: teacher and student have the same widths and depth, so
nothing is projected; centring takes the place of a norm that some models have behind their pooling; other sizes than
the teacher's are the student's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.datasets import normalize
from ...data.splits import scaled
from ...data.transfer import onto, read
from ...errors import ConfigError
from ...models.swin.model import Swin
from ...models.unwrap import unwrapped_module
from ...models.vit import ViT
from ...modes import evaluating
from ...seeding import generator
from ...spec import Plain, Size, Sizes
from ..compiling import blocks_of
from ..distributed import sum_over_ranks
from ..task import Batch, Task
from .classification import ImageTask, evaluation_batches

BLOCKS = 30.0  # weight of the features behind blocks (docs/decisions/0016)
SPREAD_IMAGES = 64  # of which their standard deviation is taken


class Seen(NamedTuple):
    """What a model makes of images.

    Args:
        out: (B, classes) logits; of a model without a classifier its features, pooled or not.
        patches: (B, D, rows, columns), before pooling.
        pooled: (B, D), their mean, or the leading tokens' where there are any.
        blocks: behind each block the patches (B, D, rows, columns), and leading tokens (B, D, P) where there are any.
    """

    out: Tensor
    patches: Tensor
    pooled: Tensor
    blocks: tuple[tuple[Tensor, ...], ...]


def look(forward: nn.Module, images: Tensor) -> Seen:
    """The answers of a ViT or a Swin, or of what DDP or the compiler put around it, and the features behind them."""
    model, found, inside = unwrapped_module(forward), list[Tensor](), list[Tensor]()
    if not isinstance(model, ViT | Swin):
        raise ConfigError(f"features are those of a ViT or a Swin of ours, got a {type(model).__name__}")
    with ExitStack() as hooks:
        hooks.callback(model.norm.register_forward_hook(lambda module, given, out: found.append(out)).remove)
        for block in blocks_of(model):
            hooks.callback(block.register_forward_hook(lambda module, given, out: inside.append(out)).remove)
        out = forward(images)
    (patches, *leading), *blocks = (_split(model, tokens.float(), images) for tokens in (found[0], *inside))
    return Seen(out, patches, leading[0].mean(2) if leading else patches.mean((2, 3)), tuple(blocks))


def _split(model: ViT | Swin, tokens: Tensor, images: Tensor) -> tuple[Tensor, ...]:
    """Patches (B, D, rows, columns), and (B, D, P) leading tokens where there are any."""
    if isinstance(model, Swin):
        return (tokens.permute(0, 3, 1, 2),)
    channels, n = tokens.transpose(1, 2), model.num_prefix_tokens  # (B, D, N)
    patches = channels[:, :, n:].unflatten(2, model.patch_embed.grid(*images.shape[-2:]))
    return (patches, channels[:, :, :n]) if n else (patches,)


def answers_differ(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """t² KL(teacher || student) of logits (B, classes) over a temperature t, in nats, the mean over images."""
    p, q = ((logits.float() / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def features_differ(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean of 1 - r over (B, D, ...), r the correlation over D; 0 for equal features, whatever their scale."""
    a, b = (x.float() - x.float().mean(1, keepdim=True) for x in (_on_grid(teacher, student), student))
    return (1 - F.cosine_similarity(a, b, dim=1)).mean()


def errors(teacher: Tensor, student: Tensor, spread: Tensor) -> Tensor:
    """The mean square of the difference of features (B, D, ...), in units of `spread` (D,)."""
    apart = (student - _on_grid(teacher, student)).movedim(1, -1) / spread
    return apart.square().mean()


def _on_grid(teacher: Tensor, student: Tensor) -> Tensor:
    """Features of the teacher; patches (B, D, rows, columns) resized to the student's grid."""
    if teacher.shape == student.shape:
        return teacher
    return F.interpolate(teacher, student.shape[2:], mode="bilinear", antialias=True)


def spreads(seen: Seen) -> list[Tensor]:
    """(D,) behind each block: the standard deviation of each channel over all tokens, of constant ones above 0."""
    found = []
    for block in seen.blocks:
        tokens = torch.cat([part.flatten(2) for part in block], dim=2).movedim(1, -1).flatten(0, 1)  # (B N, D)
        found.append((tokens.var(0, correction=0) + 1e-4 * tokens.square().mean()).sqrt())
    return found


@dataclass
class DistillTask(Task[Batch]):
    """A student learns from a teacher.

    Args:
        images: batches and views of images at the size they are stored in; their labels are not used, but that their
            agreement is measured beside.
        teacher: in evaluation mode, on the device of the images; it is left as it is.
        own: (H, W) that the teacher sees.
        sizes: (H, W) that the student sees, of which each step draws one.
        temperature: t.
        classifier: whether the models' outputs are logits.
        about: more for the checkpoint.
    """

    images: ImageTask
    teacher: ViT | Swin
    own: Size
    sizes: Sizes
    temperature: float
    classifier: bool
    about: Mapping[str, Plain]
    unit: str = "images"
    best: tuple[str, str] | None = None  # the last weights: held-out images choose nothing
    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.images.steps_per_epoch

    @cached_property
    def spreads(self) -> list[Tensor]:
        """(D,) behind each block of the teacher, of images of all folders, on every rank the same."""
        task, count = self.images, len(self.images.train)
        some = torch.linspace(0, count - 1, min(count, SPREAD_IMAGES)).long()
        images = normalize(onto(task.train.pixels(some), task.device).float() / 255, task.data.mean, task.data.std)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return spreads(look(self.teacher, scaled(images, self.own)))

    def batch(self, epoch: int, step: int) -> Batch:
        task = self.images
        batch = task.batch(epoch, step)
        draw = torch.randint(len(self.sizes), (1,), generator=generator(task.seed, epoch, step, "size"))
        seen = scaled(batch["images"], self.sizes[int(draw)])
        return dict(images=scaled(batch["images"], self.own), seen=seen, index=batch["index"])

    def close(self) -> None:
        self.images.close()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        student = look(model, batch["seen"])
        with torch.no_grad():
            teacher = look(self.teacher, batch["images"])
        return self.differ(teacher, student)

    def differ(self, teacher: Seen, student: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name."""
        behind = [
            errors(a, b, spread)
            for one, other, spread in zip(teacher.blocks, student.blocks, self.spreads, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        parts = dict(
            patch_loss=features_differ(teacher.patches, student.patches),
            pooled_loss=features_differ(teacher.pooled, student.pooled),
            block_loss=BLOCKS / len(self.spreads) * torch.stack(behind).sum(),
        )
        if self.classifier:
            parts["answer_loss"] = answers_differ(teacher.out, student.out, self.temperature)
        return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """At the teacher's size: the loss on held-out images, and of how many both name the same class (percent)."""
        with evaluating(model):
            splits = list(self.images.data.held_out)
            return {name: value for split in splits for name, value in self._score(model, split).items()}

    def _score(self, model: nn.Module, split: str) -> dict[str, float]:
        task = self.images
        found, counts = list[tuple[Tensor, Tensor]](), list[int]()  # loss and equal answers of each batch
        where = (task.world, split, task.workers, task.device)
        for images, _ in evaluation_batches(task.data, None, 256, *where):
            images = scaled(images, self.own)
            # Collectives need every rank in each forward pass, one without images left too.
            student = look(model, images)
            if len(images):
                teacher = look(self.teacher, images)
                equal = teacher.out.argmax(-1) == student.out.argmax(-1) if self.classifier else images[:0]
                found.append((self.differ(teacher, student)[0], equal.sum()))
                counts.append(len(images))
        numbers = read(found)
        losses = [loss * count for (loss, _), count in zip(numbers, counts, strict=True)]
        loss, same, n = sum_over_ranks([sum(losses), sum(row[1] for row in numbers), sum(counts)], task.world)
        return {f"{split}_loss": loss / n} | ({f"{split}_agreement": 100 * same / n} if self.classifier else {})

    def describe(self) -> dict[str, Plain]:
        return self.images.describe() | dict(task="distillation", train_size=list(self.own)) | dict(self.about)
