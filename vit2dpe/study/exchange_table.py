"""What an exchange of encodings costs, and what is recovered: table, picture and sentence.

Three models on the same images: the old one, the new one as it was exchanged, and what it is after it has learned.
Agreement is the share of images that a model names as the old one does at its own size; of models without classes the
mean cosine of their features and its, in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import write_atomically
from ..models.timm_api import every_policy
from ..modes import evaluating
from ..plots.figures import save_figure
from ..resolution.apply import use_policy
from ..resolution.sweep import fit_size
from ..spec import Size, show_size
from .held_out import Batches
from .intervals import LEVEL, Interval, normal_quantile, over_images
from .pictures import draw
from .rows import Row, to_csv
from .tables import table


class Model(NamedTuple):
    """One of the three, the label it has in the table, and the words of its policies."""

    label: str
    model: nn.Module
    policies: Sequence[str]


class Measured(NamedTuple):
    """A row, and of each image what it is the mean of: (n,)."""

    row: Row
    values: Tensor


def measure(models: Sequence[Model], data: Batches, sizes: Sequence[Size], own: Size, labelled: bool) -> list[Measured]:
    """Rows of each metric, model, policy and size; accuracy first, where there are labels.

    Args:
        models: the old one first.
        own: its size.
    """
    first = models[0].model
    reference = _answers(first, data, own, "default")
    found: list[Measured] = []
    for label, model, words in models:
        chosen = every_policy(model) if "all" in words else tuple(words)
        at_own: Tensor | None = None  # where no policy changes a bit
        for policy in chosen:
            for size in sizes:
                answers = at_own if size == own and at_own is not None else _answers(model, data, size, policy)
                at_own = answers if size == own else at_own
                metrics = {"agreement": _same(answers, reference)}
                if reference.ndim != 1:
                    metrics = {"similarity": F.cosine_similarity(answers, reference, dim=1)}
                elif labelled:
                    metrics = {"top1": _same(answers, data.labels)} | metrics
                for metric, values in metrics.items():
                    row = Row(
                        encoding=label, policy=policy, mode="scale", train_height=own[0], train_width=own[1],
                        height=size[0], width=size[1], n=len(values), metric=metric, value=100 * float(values.mean()),
                    )  # fmt: skip
                    found.append(Measured(row, values))
    return sorted(found, key=lambda one: one.row.metric != found[0].row.metric)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other).double()


@torch.inference_mode()
def _answers(model: nn.Module, data: Batches, size: Size, policy: str) -> Tensor:
    """(n,) the likeliest classes; of a model without classes its features (n, D)."""
    device, found = next(model.parameters()).device, list[Tensor]()
    with evaluating(model), use_policy(model, policy):
        for images, _ in data:
            out = model(fit_size(images, size, "scale", size).to(device)).float().cpu()
            out = out if out.ndim == 2 else out.flatten(1, -2).mean(1)  # of a model that does not pool
            found.append(out.argmax(-1) if getattr(model, "num_classes", 0) else out)
    return torch.cat(found)


def write(folder: Path, found: Sequence[Measured]) -> list[str]:
    """`swap.csv` and `swap.png`; the lines that are printed."""
    rows = [one.row for one in found]
    write_atomically(folder / "swap.csv", to_csv(rows).encode())
    first = [row for row in rows if row.metric == rows[0].metric]
    picture = save_figure(draw(first), folder / "swap.png", dpi=110)
    tables = [table([row for row in rows if row.metric == name]) for name in dict.fromkeys(row.metric for row in rows)]
    return [*tables, sentence(found), f"table {folder / 'swap.csv'}; picture {picture}"]


def sentence(found: Sequence[Measured]) -> str:
    """What was lost and what was recovered, at each size, with the interval of the difference over the same images."""
    metric = found[0].row.metric
    shown = [one for one in found if one.row.metric == metric]
    old, swapped, recovered = ([one for one in shown if one.row.encoding == label] for label in _labels(shown))
    lines = []
    for size in dict.fromkeys(one.row.size for one in shown):
        before = max(_at(old, size), key=lambda one: one.row.value)
        lost, after = _at(swapped, size)[0], _at(recovered, size)[0]
        said = (
            f"{metric} at {show_size((int(size[0]), int(size[1])))}: old {before.row.value:.1f} ({before.row.policy})"
        )
        said += f", swapped {lost.row.value:.1f}, recovered {after.row.value:.1f} ({after.row.policy})"
        low, high = difference(after.values, before.values)
        lines.append(f"{said}; recovered - old {after.row.value - before.row.value:+.1f} [{low:+.1f}, {high:+.1f}]")
    return "\n".join(lines)


def difference(one: Tensor, other: Tensor) -> Interval:
    """95% interval, in points, of the mean difference over the same images."""
    paired = one - other
    if bool(((one == 0) | (one == 1)).all() and ((other == 0) | (other == 1)).all()):
        return over_images(paired, normal_quantile((1 + LEVEL) / 2))
    half = normal_quantile((1 + LEVEL) / 2) * float(paired.std()) / len(paired) ** 0.5
    return Interval(100 * (float(paired.mean()) - half), 100 * (float(paired.mean()) + half))


def _labels(found: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(one.row.encoding for one in found))


def _at(found: Sequence[Measured], size: tuple[float, float]) -> list[Measured]:
    return [one for one in found if one.row.size == size]
