"""This process among others, under torchrun: plain torch.distributed, DDP or FSDP2, NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError, unknown

PARALLEL = ("ddp", "fsdp")
# Seconds that an exchange may take, the wait for the slowest included: on CPUs; on GPUs, where kernels are built and
# libraries tuned at the first step of each process, torch's own; where a model is compiled, which takes minutes.
ON_CPU, ON_GPU, COMPILED = 60.0, 600.0, 1800.0


@dataclass(frozen=True)
class World:
    """The rank of this process, and the number of processes.

    Args:
        patient: the processes as a group whose exchanges may last long, for `wait`; None: there is nothing to wait for.
        hosts: the processes as a group that exchanges numbers of the hosts; None: the group of all exchanges does.
    """

    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    hosts: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here: before the next exchange, where one of them may have worked alone for long."""
        if self.patient is not None:
            dist.barrier(group=self.patient)

    def gather(self, words: Sequence[str]) -> list[str]:
        """The words of all processes, in the order of their ranks; each may have worked on its own for long."""
        if self.patient is None:
            return list(words)
        parts: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(words), group=self.patient)
        return [word for part in parts for word in part]

    def share(self, n: int) -> slice:
        """This rank's contiguous part of n things; the parts differ by at most one and cover all of them."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


ALONE = World()


@contextmanager
def process_group(
    device: torch.device, timeout_s: float | None = None, wait_minutes: float = 600, compiled: bool = False
) -> Iterator[World]:
    """The processes that torchrun started, by its environment variables; this one alone without them.

    A rank that dies closes its connections, and the others fail at their next exchange; one that hangs is given
    `timeout_s`, by default what the device and a model that is `compiled` may take. Where one works alone, as the first
    does in writing files, all wait for it up to `wait_minutes`, and so they do at the end.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if timeout_s is None:
        timeout_s = COMPILED if compiled else ON_GPU if device.type == "cuda" else ON_CPU
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    rank = dist.get_rank()
    patient = dist.new_group(backend="gloo", timeout=timedelta(minutes=wait_minutes))
    hosts = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    world = World(rank, size, *(g if isinstance(g, dist.ProcessGroup) else None for g in (patient, hosts)))
    try:
        yield world
        world.wait()
    except RuntimeError as error:
        if is_lost(error):
            why = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"rank {rank} lost another process ({why}): look for what that one said; with --resume the run goes on "
                "from its last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether an exchange failed: an error of torch.distributed by its kind, or raised in there.

    What gloo raises in a backward pass, where DDP exchanges gradients, has no kind of its own; there its name tells.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = Path(frames[-1].filename).parts if frames else ()
    inside = ("torch", "distributed") in pairwise(where)
    return isinstance(error, dist.DistError) or inside or ("torch" in where and "gloo" in str(error).lower())


def local_device(name: str) -> str:
    """ "auto" and "cuda" become this process's own GPU under torchrun."""
    if "LOCAL_RANK" in os.environ and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def parallelize(model: nn.Module, how: str, world: World) -> nn.Module:
    """The module that every rank calls: DDP's wrapper, or the model itself, sharded in place by FSDP2."""
    if how not in PARALLEL:
        raise unknown("way to train in parallel", how, PARALLEL)
    if world.size == 1:
        return model
    if how == "fsdp":
        return shard(model)
    device = next(model.parameters()).device
    # A kernel of one channel has two descriptions by strides of the same memory: harmless.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):  # the blocks of a transformer
            for block in module:
                fully_shard(block)
    fully_shard(model)
    return model


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Numbers of the hosts, over the hosts' network: no device waits."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(total, group=world.hosts)
    return total.tolist()


def sum_on_device(values: Tensor, world: World) -> Tensor:
    """(n,) float64: numbers of the devices, the first of them, which all ranks have, as it is."""
    values = values.double()
    dist.all_reduce(values[1:])
    return values


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective: every rank must call it); others as they are."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def full_tensor(tensor: Tensor) -> Tensor:
    """`whole` on the CPU."""
    return whole(tensor).cpu()


def shard_like(value: Tensor, like: Tensor, *, scalars: bool = False) -> Tensor:
    """`value` on the device of `like`, sharded as `like` is; scalars stay where they are, or are moved too."""
    if hasattr(like, "device_mesh") and hasattr(like, "placements") and value.shape == like.shape and value.ndim:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device) if value.ndim or scalars else value


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without exchanging them, where the model is wrapped or sharded."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield
