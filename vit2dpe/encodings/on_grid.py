"""Formulas with a constant of the grid they are trained on, which a checkpoint has to keep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .base import PositionEncoding


class OnGrid(PositionEncoding):
    """An encoding whose formula has a constant of the grid it is trained on; `set_grid` leaves it alone.

    The grid is in the state_dict (`_extra_state`, (d,) integers), as that of a table is in its shape: another size, or
    a model built for another one, does not change the function that was trained. (docs/decisions/0007)
    """

    grid: tuple[int, ...]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.grid, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        if len(state) != len(self.grid):
            raise CheckpointError(
                f"{type(self).__name__} was trained on a grid of {len(state)} axes, this one is for {len(self.grid)}"
            )
        self.grid = tuple(int(size) for size in state)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # Other people's weights do not have it: then the grid that the model was built for is kept.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)
