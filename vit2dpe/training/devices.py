"""Devices and precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ..errors import ConfigError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS gives the same bits
FILL = "fill_uninitialized_memory"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with so many CPU threads; None leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """The same bits each time, on a GPU too: deterministic algorithms, no attention of cuDNN, no choice by timing.

    By https://docs.pytorch.org/docs/stable/notes/randomness.html; what was set before is set again behind it. It says
    nothing about other cards, versions or numbers of processes.

    Raises:
        ConfigError: inside, from an operation that has no deterministic algorithm.
    """
    if not wanted:
        yield
        return
    warn, memory = torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), getattr(memory, FILL)
    timed, attention = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    workspace = os.environ.get(WORKSPACE)
    if workspace not in WORKSPACES:
        os.environ[WORKSPACE] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    setattr(memory, FILL, False)  # a search for faults, at the cost of a pass over all that is made
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise ConfigError(f"run.deterministic: {str(error).partition(',')[0]}; leave one of the two out") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        setattr(memory, FILL, filled)
        torch.backends.cudnn.benchmark = timed
        torch.backends.cuda.enable_cudnn_sdp(attention)
        if workspace is None:
            del os.environ[WORKSPACE]
        else:
            os.environ[WORKSPACE] = workspace


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
