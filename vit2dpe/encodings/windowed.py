"""`windowed`: a learned table for the whole image, resized, plus one for a window, repeated.

    token(p) = pos_embed[p] + pos_embed_window[p mod W],    both N(0, 0.02), truncated

Sources: absolute windows, arXiv 2311.05613; timm, `hiera.py` (`abs_pos_embed` with `pos_embed_window`); SAM 2.

How ours differs: any number of axes; the window need not divide the grid (timm tiles a whole number of times and needs
it to). At another extent the global table is resized bicubic with antialias, as `learned` is, and the window table is
repeated as it is: what resizing a table would blur, a model of windows has learned at the scale of its window. Between
whole places both are read bilinearly, or bicubically, the window table across the seam between two windows too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions
from .base import PositionEncoding
from .between import check_sample, read_tokens, tokens_at
from .mixed import tokens_by_sample
from .tables import channels_first, fitted, replace


class WindowedTable(PositionEncoding):
    """A global and a repeated window table.

    Args:
        dim: width D.
        grid: the sizes the global table is learned on.
        window: W, the side of the window in patches, along every axis.
        sample: how both are read at fractional places: "bilinear" or "bicubic".
    """

    gives = frozenset({"token"})
    policies = ("resize", "interpolate")
    resizes = ("antialias", "plain", "bilinear")

    def __init__(self, dim: int, grid: Sequence[int], *, window: int = 4, sample: str = "bilinear") -> None:
        super().__init__()
        self.sample = check_sample("windowed", sample)
        if not grid or any(size < 1 for size in grid) or window < 1:
            raise ConfigError(f"windowed needs a grid and a window of at least 1, got {tuple(grid)} and {window}")
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, dim))
        self.pos_embed_window = nn.Parameter(torch.empty(1, *[window] * len(grid), dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.pos_embed_window, std=0.02)

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, ...]) -> None:
        table = fitted(self, channels_first(self.pos_embed[0]), tuple(grid), "antialias")
        replace(self.pos_embed, table.movedim(0, -1)[None].contiguous())

    def token(self, at: Positions) -> Tensor:
        if at.axes != self.pos_embed.ndim - 2:
            raise ValueError(f"the tables have {self.pos_embed.ndim - 2} axes, the positions {at.axes}")
        table = channels_first(self.pos_embed[0])
        if isinstance(at.extent, Tensor):
            image = tokens_by_sample(self.policy, table, at, "antialias", self.sample)
        else:
            image = tokens_at(fitted(self, table, at.extent, "antialias"), at, self.sample)
        window = self.pos_embed_window[0]
        if not at.on_integers():
            return image + read_tokens(channels_first(window), at, self.sample, wrap=True)
        return image + window[at.places().remainder(window.shape[0]).unbind(-1)]

    def extra_repr(self) -> str:
        return f"grid={tuple(self.pos_embed.shape[1:-1])}, window={self.pos_embed_window.shape[1]}"
