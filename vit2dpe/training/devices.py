"""Devices and precision."""

from __future__ import annotations

import torch

from ..errors import ConfigError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, then MPS, then the CPU; a device that cannot be used raises ConfigError."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32. "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name != "auto" and name not in PRECISIONS:
        raise ConfigError(f"precision must be auto, float32, bfloat16 or float16, got {name!r}")
    return PRECISIONS["bfloat16" if device.type == "cuda" else "float32"] if name == "auto" else PRECISIONS[name]
