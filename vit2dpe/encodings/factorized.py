"""`factorized`: one learned vector for each row and one for each column, added up.

    token(p) = Σ_a tables[a][p_a],    tables[a] (S_a, D) ~ N(0, 0.02)

Sources: NaViT, arXiv 2307.06304; timm, `naflexvit.py` (`pos_embed='factorized'`).

How ours differs: any number of axes. At another extent each axis is resized on its own, linearly and without
antialias, as timm does, so any aspect ratio is met. Between whole places each is read linearly, or cubically.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..positions import Positions, exact
from .aspect import squared
from .base import PositionEncoding
from .between import check_inside, check_sample, read, taps
from .mixed import tokens_by_sample
from .mlp import lifted
from .tables import check_places, fitted, replace


class Factorized(PositionEncoding):
    """A table for each axis.

    Args:
        dim: width D.
        grid: the sizes (S_1, ..., S_d) it is learned on.
        keep_aspect: another extent gets the first rows and columns of a square, see `aspect.py`.
        sample: how they are read at fractional places: "bilinear", of one axis linear, or "bicubic".
    """

    gives = frozenset({"token"})
    policies = ("resize", "interpolate")
    resizes = ("bilinear", "plain", "antialias")

    def __init__(self, dim: int, grid: Sequence[int], *, keep_aspect: bool = False, sample: str = "bilinear") -> None:
        super().__init__()
        self.keep_aspect, self.sample = keep_aspect, check_sample("factorized", sample)
        if not grid or any(size < 1 for size in grid):
            raise ConfigError(f"factorized needs the sizes of its grid, each at least 1, got {tuple(grid)}")
        self.tables = nn.ParameterList(torch.empty(size, dim) for size in grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.tables:
            nn.init.normal_(table, std=0.02)

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, ...]) -> None:
        for axis, size in enumerate(grid):
            table = self.tables[axis]
            replace(table, fitted(self, table.t(), (size,), "bilinear", axis).t().contiguous())

    def token(self, at: Positions) -> Tensor:
        if at.axes != len(self.tables):
            raise ValueError(f"there are tables for {len(self.tables)} axes, the positions have {at.axes}")
        if self.keep_aspect:
            at = squared(at)
        if isinstance(at.extent, Tensor):
            along = [(axis, table.t()) for axis, table in enumerate(self.tables)]
            own = [tokens_by_sample(self.policy, t, at, "bilinear", self.sample, axis) for axis, t in along]
            return torch.stack(own).sum(0)
        lines = [fitted(self, self.tables[a].t(), (size,), "bilinear", a) for a, size in enumerate(at.extent)]  # (D, S)
        if at.on_integers():
            places = check_places(at)
            rows = [line.t()[places[..., axis]] for axis, line in enumerate(lines)]
        else:
            check_inside(at)
            wide, x = [lifted(line) for line in lines], exact(at.coords)
            found = [taps(x[..., a, None], line.shape[1:], self.sample, line.dtype) for a, line in enumerate(wide)]
            rows = [read(line, where).movedim(0, -1) for line, where in zip(wide, found, strict=True)]
        return torch.stack(rows).sum(0)  # (B|1, N, D)

    def extra_repr(self) -> str:
        return f"grid={tuple(len(table) for table in self.tables)}"
