"""Tensors of the host on a device, and numbers back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on a device; the host goes on meanwhile. CUDA copies from pinned memory without waiting for anything."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)


def read(rows: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """Numbers of batches that lie on a device, a row each, as float32 (counts of a batch are exact): the host waits for
    all of them once."""
    return torch.stack([torch.stack([value.float() for value in row]) for row in rows]).tolist() if rows else []


def sums(rows: Sequence[Sequence[Tensor]], columns: int) -> list[float]:
    """Sums of such numbers over batches, added up in float64."""
    return [sum(column) for column in zip(*read(rows), strict=True)] if rows else [0.0] * columns
