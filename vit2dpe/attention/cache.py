"""What decoding remembers, so that a step costs as much as there are tokens and not its square.

Legend: B batch, H_kv heads of keys and values, Dh head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..positions import Positions


class LayerCache:
    """One block's keys (rotated) and values (B, H_kv, length, Dh), filled from the front; and those of its memory."""

    def __init__(self, length: int) -> None:
        self.length, self.size = length, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.memory: tuple[Tensor, Tensor] | None = None  # of cross-attention, made at the first step

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, these among them. For inference: what is kept is written in place."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (t.new_empty(*t.shape[:2], self.length, t.shape[3]) for t in (k, v))
        start, self.size = self.size, self.size + k.shape[2]
        if self.size > self.length:
            raise ValueError(f"the cache holds {self.length} tokens and was given {self.size}: make a longer one")
        self.keys[:, :, start : self.size] = k
        self.values[:, :, start : self.size] = v
        return self.keys[:, :, : self.size], self.values[:, :, : self.size]

    def reorder(self, index: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[index], self.values[index]
        if self.memory is not None:
            self.memory = (self.memory[0][index], self.memory[1][index])


class KVCache:
    """Keys and values of the tokens seen so far, for every block, and where those tokens are.

    Keys are kept rotated. So the extent that a resolution policy measures is fixed when the cache is made, and a
    token keeps its place from step to step.

    Args:
        length: how many tokens it holds at most; the extent of their line, where that is longer than the model's own.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"a cache holds at least one token, got length={length}")
        self.length = length
        self.reset()

    def reset(self) -> None:
        """Forget everything; the length stays."""
        self.layers: dict[int, LayerCache] = {}
        self.at: Positions | None = None
        self.valid: Tensor | None = None  # (B, size), False where a token is padding; None: no padding

    @property
    def size(self) -> int:
        """Tokens seen so far."""
        return 0 if self.at is None else self.at.coords.shape[1]

    def layer(self, index: int) -> LayerCache:
        return self.layers.setdefault(index, LayerCache(self.length))

    def extend(self, at: Positions, valid: Tensor | None) -> None:
        """Note where new tokens are, before the blocks append their keys."""
        if self.size + at.coords.shape[1] > self.length:
            came = self.size + at.coords.shape[1]
            raise ValueError(f"the cache holds {self.length} tokens and was given {came}: make a longer one")
        if self.at is None:
            self.at, self.valid = at, valid
            return
        before, new = self.at.coords, at.coords
        batch = max(before.shape[0], new.shape[0])
        coords = torch.cat([t.expand(batch, -1, -1) for t in (before, new)], dim=1)
        if valid is not None or self.valid is not None:
            old = coords.new_ones(batch, before.shape[1], dtype=torch.bool) if self.valid is None else self.valid
            now = coords.new_ones(batch, new.shape[1], dtype=torch.bool) if valid is None else valid
            self.valid = torch.cat([old.expand(batch, -1), now.expand(batch, -1)], dim=1)
        self.at = Positions(coords, at.extent, on_grid=at.on_grid and self.at.on_grid)

    def reorder(self, index: Tensor) -> None:
        """Sample b becomes what sample index[b] was: (B',), as beam search needs it."""
        for layer in self.layers.values():
            layer.reorder(index)
        if self.at is not None and self.at.coords.shape[0] > 1:
            self.at = Positions(self.at.coords[index], self.at.extent, on_grid=self.at.on_grid)
        if self.valid is not None:
            self.valid = self.valid[index]
