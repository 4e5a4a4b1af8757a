"""What happens at a resolution a model was not trained at: `use_policy` chooses, `sweep` measures.

How a policy is put on a model is in `apply.py`, the policies themselves are in `policies.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.splits import scaled
from ..data.transfer import onto, sums
from ..encodings import named_encodings
from ..errors import ConfigError, unknown
from ..modes import evaluating
from ..spec import Size
from .apply import policies_of, use_policy

MODES = ("scale", "canvas")


class SweepRow(TypedDict):
    """A classifier at one size: sizes in pixels, top1 in percent, loss in nats, over n images."""

    policy: str
    temperature: str
    mode: str
    train_height: int
    train_width: int
    height: int
    width: int
    top1: float
    loss: float
    n: int


def sweep(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    sizes: Sequence[Size],
    policies: Sequence[str] | None = None,
    *,
    modes: Sequence[str] = ("scale",),
    temperatures: Sequence[str] = ("none",),
    train_size: Size | None = None,
    crop: float = 1.0,
    right: list[Tensor] | None = None,
    by_class: list[Tensor] | None = None,
    spacing: float | None = None,
) -> list[SweepRow]:
    """Accuracy of a classifier at other sizes: one row for each size, mode, policy and temperature.

    Args:
        model: any module from images (B, C, H, W) to logits (B, classes); policies need one of ours.
        data: batches (images, labels), normalised as the model wants them, iterated once for each row.
        sizes: (height, width) in pixels; rectangles too.
        policies: words for `use_policy`; default: all that the model can take.
        modes: "scale": the same picture with more pixels (it is resized to the size). "canvas": more content at the
            scale of training (the picture at the training size in the middle, continued by its mirror image; smaller
            canvases see its middle). The two answer different questions and are never mixed in a row.
        train_size: (height, width) of training; default: the model's.
        crop: the centre share of each side that is kept, the same for all sizes.
        right: a list that collects, for each row, which images the model has right: (n,) booleans on the CPU.
        by_class: a list that collects, for each row, the counts of each class: see `evaluate`.
        spacing: given to the model: the size of a pixel in the world over that of training, at every size.

    Returns:
        rows with mode, policy, temperature, train_height, train_width, height, width, top1 (percent), loss (nats), n.
    """
    for mode in modes:
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
    train_size = train_size or train_size_of(model)
    ours = bool(named_encodings(model))
    spacing_of(model, spacing)  # or refused, before anything is measured
    rows: list[SweepRow] = []
    for mode in modes:
        for policy in policies or policies_of(model):
            for temperature in temperatures:
                for size in sizes:
                    batches = ((fit_size(x, size, mode, train_size, crop), y) for x, y in data)
                    if ours:
                        with use_policy(model, policy, temperature=temperature):
                            score = evaluate(model, batches, right=right, by_class=by_class, spacing=spacing)
                    elif policy == "default" and temperature == "none":
                        score = evaluate(model, batches, right=right, by_class=by_class, spacing=spacing)
                    else:
                        raise ConfigError(
                            f"policy {policy!r} with temperature {temperature!r} needs a model of ours; "
                            f"{type(model).__name__} runs with 'default' and 'none' only"
                        )
                    rows.append(
                        SweepRow(
                            policy=policy,
                            temperature=temperature,
                            mode=mode,
                            train_height=train_size[0],
                            train_width=train_size[1],
                            height=size[0],
                            width=size[1],
                            top1=score["top1"],
                            loss=score["loss"],
                            n=int(score["n"]),
                        )
                    )
    return rows


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    top: Sequence[int] = (1,),
    right: list[Tensor] | None = None,
    least: int = 1,
    by_class: list[Tensor] | None = None,
    spacing: float | None = None,
) -> dict[str, float]:
    """{"top1": percent, "loss": nats, "n": images} of a classifier in evaluation mode; its mode is put back.

    Sums stay on the device of the model and are read once, after the last batch.

    Args:
        top: for each k how often the label is among the k likeliest classes, as "topk".
        right: a list that gains (n,) booleans on the CPU: whether the likeliest class is the label.
        by_class: a list that gains (3, C) int64 on the CPU: images of each class, right ones, images named so.
        spacing: given to the model, which must take it.
        least: images there must be; 0 for a process whose share of them may be empty: its numbers are then 0.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    more = spacing_of(model, spacing)
    numbers, named, wanted = list[list[Tensor]](), list[Tensor](), list[Tensor]()
    n = classes = 0
    with evaluating(model):
        for images, labels in batches:
            n += len(labels)
            logits, labels = model(onto(images, device), **more).float(), onto(labels, device)
            found = [F.cross_entropy(logits, labels, reduction="sum")]
            for k in top:
                likeliest = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices
                found.append((likeliest == labels[:, None]).sum())
            numbers.append(found)
            if right is not None or by_class is not None:
                named.append(logits.argmax(-1))
                wanted.append(labels)
                classes = logits.shape[-1]
    if n < least:
        raise ConfigError("no images to evaluate: the data are empty, or an iterator that was used up")
    loss, *hits = sums(numbers, 1 + len(top))
    if named:
        answers, labels = torch.stack([torch.cat(named), torch.cat(wanted)]).cpu()
        if right is not None:
            right.append(answers == labels)
        if by_class is not None:
            parts = (labels, labels[answers == labels], answers)
            by_class.append(torch.stack([part.bincount(minlength=classes) for part in parts]))
    shares = {f"top{k}": 100 * count / max(1, n) for k, count in zip(top, hits, strict=True)}
    return shares | {"loss": loss / max(1, n), "n": n}


def spacing_of(model: nn.Module, spacing: float | None) -> dict[str, float]:
    """The argument `spacing` for a model, where there is one.

    Raises:
        ConfigError: for a model that does not take it.
    """
    if spacing is None:
        return {}
    if "spacing" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} takes no spacing: a vit2dpe.ViT does, with any encoding by formula")
    return {"spacing": spacing}


def fit_size(images: Tensor, size: Size, mode: str, train_size: Size, crop: float = 1.0) -> Tensor:
    """(B, C, H, W) -> (B, C, *size) by one of the two modes of `sweep`."""
    if mode == "scale":
        return scaled(images, size, crop)
    images = scaled(images, train_size, crop)
    for dim, (side, train) in zip((-2, -1), zip(size, train_size, strict=True), strict=True):
        index = torch.arange(side, device=images.device) + (train - side) // 2
        index = index.remainder(2 * train)
        images = images.index_select(dim, torch.where(index < train, index, 2 * train - 1 - index))
    return images


def train_size_of(model: nn.Module, about: Mapping[str, object] | None = None) -> Size:
    """The size in pixels a model was trained at: ours remember it, timm's say it in their config.

    Args:
        about: as for `part_size_of`.
    """
    return part_size_of(model, about) or table_size_of(model)


def part_size_of(model: nn.Module, about: Mapping[str, object] | None = None) -> Size | None:
    """The size in pixels of a model that was trained on parts of tables (policy `subtable`), which its grid is not.

    Args:
        about: its record, which has this size; default the one that `load_run` leaves on the model.
    """
    record = vars(model).get("about") if about is None else about
    sides = record.get("train_size") if isinstance(record, Mapping) else None
    parts = any(getattr(one.own_policy, "name", "") == "subtable" for one in named_encodings(model).values())
    return (int(sides[0]), int(sides[1])) if parts and isinstance(sides, list) and len(sides) == 2 else None


def table_size_of(model: nn.Module) -> Size:
    """The size in pixels of the grid of a model, the one its tables have."""
    if hasattr(model, "train_grid") and hasattr(model, "patch_embed"):
        grid: tuple[int, ...] = model.train_grid  # type: ignore[assignment]
        patch: tuple[int, ...] = model.patch_embed.patch_size  # type: ignore[union-attr, assignment]
        if len(grid) != 2:
            raise ConfigError(
                f"sizes are those of images, and this {type(model).__name__} has {len(grid)} axes: call it at another "
                "size within use_policy"
            )
        return grid[0] * patch[0], grid[1] * patch[1]
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg and cfg.get("input_size"):
        return cfg["input_size"][-2], cfg["input_size"][-1]
    raise ConfigError(
        f"{type(model).__name__} does not say the size it was trained at: give train_size=(height, width)"
    )
