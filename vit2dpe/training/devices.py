"""Devices and precision."""

from __future__ import annotations

from contextlib import nullcontext

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


def evaluation_precision(name: str, device: torch.device) -> nullcontext[None] | torch.autocast:
    """That of training on a GPU; on the CPU float32 always, whose numbers are compared with those of files."""
    dtype = None if device.type == "cpu" else precision(name, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def precision_name(name: str, device: torch.device) -> str:
    """What "auto" is on a device."""
    return name if name != "auto" else "float32" if precision(name, device) is None else "bfloat16"


def precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32. "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name != "auto" and name not in PRECISIONS:
        raise ConfigError(f"precision must be auto, float32, bfloat16 or float16, got {name!r}")
    return PRECISIONS["bfloat16" if device.type == "cuda" else "float32"] if name == "auto" else PRECISIONS[name]
