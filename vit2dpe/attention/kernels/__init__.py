"""Implementations that are faster than the plain one where they serve; each states when, and what to do elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The implementation that is used, and the reason."""

    path: str
    why: str


def kernel_dtype(q: Tensor) -> torch.dtype:
    """What a kernel computes in: q's dtype, or autocast's."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return q.dtype


def trains(*inputs: Tensor) -> bool:
    """Whether gradients are on and one of the inputs requires them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def fused_kernels_allowed() -> bool:
    """Whether torch may take any of its fused kernels: `torch.nn.attention.sdpa_kernel` names others otherwise.

    Not asked for while compiling, where the answer cannot be a part of a graph.
    """
    if torch.compiler.is_compiling():
        return True
    return bool(torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled())
