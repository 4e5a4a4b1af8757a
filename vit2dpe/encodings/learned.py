"""`learned`: one learned vector for each place of the training grid, added to tokens.

    token(p) = pos_embed[p],    pos_embed (1, S_1, ..., S_d, D) ~ N(0, 0.02), truncated

Sources: ViT, arXiv 2010.11929; timm, `VisionTransformer.pos_embed` and `resample_abs_pos_embed`.

How ours differs: the table carries its grid, so a non-square one is never mistaken for a square one; there is no row
for the class token (timm's is folded into `cls_token` on loading); any number of axes. At another extent the table
is resized from the stored one at each call, in float32, by a named mode; nothing is resized in place. Between whole
places the table is read bilinearly, or bicubically (`between.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown
from ..positions import Positions
from .aspect import squared
from .base import PositionEncoding
from .between import check_sample, tokens_at
from .mixed import tokens_by_sample
from .tables import channels_first, fitted, replace

MODES = ("antialias", "plain", "dino", "bilinear", "smooth", "corners")


class LearnedTable(PositionEncoding):
    """A table of vectors, resized to the extent at hand.

    Args:
        dim: width D.
        grid: the sizes (S_1, ..., S_d) it is learned on.
        resize: how the table meets another extent: "antialias" (bicubic with antialias, timm), "plain" (bicubic
            without, MAE, rope-vit, transformers), or "dino" (plain, by a scale factor with 0.1 patch added to each
            side, as DINO's and the first DINOv2 weights were used); bilinear: "smooth" (with antialias, SigLIP 2),
            "bilinear" (without, RADIO), or "corners" (without, the outermost places fixed, RADIO v3).
        keep_aspect: another extent gets the first rows and columns of a square table, see `aspect.py`.
        sample: how it is read at fractional places: "bilinear" or "bicubic".
    """

    gives = frozenset({"token"})
    policies = ("resize", "interpolate")
    resizes = ("antialias", "plain", "dino", "bilinear")

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        *,
        resize: str = "antialias",
        keep_aspect: bool = False,
        sample: str = "bilinear",
    ) -> None:
        super().__init__()
        if resize not in MODES:
            raise unknown("resize of learned", resize, MODES)
        self.resize, self.keep_aspect, self.sample = resize, keep_aspect, check_sample("learned", sample)
        if not grid or any(size < 1 for size in grid):
            raise ConfigError(f"learned needs the sizes of its grid, each at least 1, got {tuple(grid)}")
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, ...]) -> None:
        table = fitted(self, channels_first(self.pos_embed[0]), tuple(grid), self.resize)
        replace(self.pos_embed, table.movedim(0, -1)[None].contiguous())

    def token(self, at: Positions) -> Tensor:
        if at.axes != self.pos_embed.ndim - 2:
            raise ValueError(f"the table has {self.pos_embed.ndim - 2} axes, the positions {at.axes}")
        if self.keep_aspect:
            at = squared(at, tuple(self.pos_embed.shape[1:-1]))
        table = channels_first(self.pos_embed[0])  # (D, S_1, ..., S_d)
        if isinstance(at.extent, Tensor):
            return tokens_by_sample(self.policy, table, at, self.resize, self.sample)
        return tokens_at(fitted(self, table, at.extent, self.resize), at, self.sample)  # (B|1, N, D)

    def extra_repr(self) -> str:
        return f"dim={self.pos_embed.shape[-1]}, grid={tuple(self.pos_embed.shape[1:-1])}, resize={self.resize!r}"
