"""`--training`: what varies from step to step, so that a model meets more places than those of one grid.

    plain      every token at its place
    jitter     every token's place moved by up to half a patch along each axis (ComRoPE, arXiv 2506.03737)
    multisize  an image size drawn for each step: 3/4, 1 and 3/2 of the training size, or `augment.train_sizes`
    subtable   a table of twice the sides, of which each step draws a part at scale 1; evaluation takes the middle

`subtable` is RADIO's cropped position embedding (arXiv 2412.07679). How ours differs: one part for a step, at scale 1
(theirs: one for each image, of random scale and aspect), and the middle of the table in evaluation (theirs resizes all
of it, which is the policy `resize` here). It is for tables over places: moving all tokens together changes nothing in
`relative`, and a formula has no entries that could go untrained.

Draws come from the global generator, which is seeded for each step, or from the task's own; so a training goes on to
the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..data.settings import AugmentConfig
from ..encodings import encodings_of
from ..errors import ConfigError, unknown
from ..models.spec import ModelSpec
from ..models.timm_api import pair
from ..positions import Positions
from ..resolution.apply import position_groups
from ..resolution.policies import middle
from ..spec import Size
from .initial_weights import jitter_positions
from .starting_model import on_meta

TRAININGS = ("plain", "jitter", "multisize", "subtable")
SHARES = (0.75, 1.0, 1.5)  # of the side, of multisize
LARGER = 2  # sides of the table of subtable, over those of the training grid


def check_training(word: str) -> str:
    if word not in TRAININGS:
        raise unknown("training", word, TRAININGS)
    return word


def augmented(augment: AugmentConfig, training: str, size: Size, spec: ModelSpec) -> AugmentConfig:
    """The augmentation of a training, with the sizes of `multisize`, in whole patches, where none are given."""
    if training != "multisize" or augment.train_sizes is not None:
        return augment
    embed = getattr(on_meta(spec), "patch_embed", None)
    if embed is None:
        raise ConfigError("training multisize needs --augment.train_sizes: this model does not say its patch")
    patches = pair(embed.patch_size)

    def rounded(share: float) -> Size:
        height, width = (max(1, round(share * s / p)) * p for s, p in zip(size, patches, strict=True))
        return height, width

    return replace(augment, train_sizes=tuple(dict.fromkeys(map(rounded, SHARES))))


def varied_spec(spec: ModelSpec, training: str, size: Size) -> ModelSpec:
    """The model of a training on images of a size: of `subtable` with a larger table, whose middle is used."""
    if training != "subtable":
        return spec
    if spec.kind != "ViT":
        raise ConfigError(f"training subtable is of a ViT of ours, and the model is {spec.kind}: jitter serves it")
    larger = dict(img_size=[LARGER * side for side in size], policy="subtable")
    return ModelSpec(spec.kind, spec.arguments | larger)


def vary(model: nn.Module, training: str, jitter: float = 0.0) -> None:
    """Let the places of a model vary in training; in evaluation it is as before, and so is its state_dict.

    Args:
        jitter: the largest move in patches, where it is not that of the training, 1/2.

    Raises:
        ConfigError: for a model whose encodings cannot take this, by name.
    """
    if amount := jitter or 0.5 * (training == "jitter"):
        jitter_positions(model, amount)
    if training == "subtable":
        _check_tables(model)
        for _, owner, table in position_groups(model):
            for part in encodings_of(owner):
                part.perturb = partial(_another_part, table)  # type: ignore[method-assign]


def _another_part(table: tuple[int, ...], at: Positions) -> Callable[[Positions], Positions]:
    """From the middle of a table, where the policy puts places, to a part of it that is drawn for all encodings."""

    def draw() -> Tensor:
        rest = [most - size for size, most in zip(at.one_extent, table, strict=True)]
        first = [torch.randint(more + 1, (), device=at.coords.device) for more in rest]
        return torch.stack([f - m for f, m in zip(first, middle(at.one_extent, table), strict=True)])

    moved = at.memoize("part of a table", draw)
    return lambda where: Positions(where.coords + moved, where.extent, where.prefix, where.on_grid)


def _check_tables(model: nn.Module) -> None:
    parts = encodings_of(model)
    others = sorted({type(part).__name__ for part in parts if part.relative or not part.resizes})
    if others or not parts:
        raise ConfigError(
            "training subtable needs a table over places (learned, windowed, factorized), and "
            f"{', '.join(others) or 'a model without positions'} has none: jitter and multisize need none"
        )
