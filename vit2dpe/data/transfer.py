"""Tensors of the host on a device."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on a device; the host goes on meanwhile. CUDA copies from pinned memory without waiting for anything."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)
