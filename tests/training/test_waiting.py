"""Processes under torchrun wait for the one that works alone, for longer than an exchange may take."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

LIMIT_S, WORK_S = 1.0, 1.4
CODE = f"""
import os, sys, time, traceback
from pathlib import Path
import torch
from vit2dpe.models.spec import ModelSpec
from vit2dpe.seeding import generator
from vit2dpe.training import distributed, snapshots
from vit2dpe.training.engine import fit
from vit2dpe.training.settings import OptimConfig, RunConfig

def work(world):
    time.sleep({WORK_S} * world.first)

class Task:
    steps_per_epoch, best, unit = 2, None, "items"
    def __init__(self, world): self.world = world
    def batch(self, epoch, step): return torch.rand(2, 1, 8, 8, generator=generator(epoch, step, self.world.rank))
    def loss(self, model, batch): return model(batch).square().mean(), {{}}
    def count(self, batch): return len(batch)
    def evaluate(self, model):
        work(self.world)  # on one process alone
        return {{}}
    def describe(self): return {{}}
    def close(self): pass

def rank():
    with distributed.process_group(torch.device("cpu"), timeout_s={LIMIT_S}, wait_minutes=1) as world:
        spec = ModelSpec("ViT", dict(img_size=8, patch_size=4, in_chans=1, num_classes=2, embed_dim=8, depth=1,
                                     num_heads=2, position="rope"))
        def written(*args, **more):
            work(world)  # a slow disk
        snapshots.write_checkpoint = written
        how = OptimConfig(epochs=1, warmup_epochs=0, batch_size=4), RunConfig(device="cpu", parallel=sys.argv[2])
        fit(spec.build(), Task(world), *how, folder=Path(sys.argv[1]), spec=spec,
            world=world, on_epoch=lambda *_: work(world))  # a picture
        distributed.sum_over_ranks([1.0], world)
        texts = world.gather([str(world.rank)] * (1 + world.rank))
        if texts != ["0", "1", "1"]: raise SystemExit(f"gathered {{texts}}")
        work(world)  # the results

children = []
for number in range(2):  # forked, so that torch is imported once and both are there at the same time
    child = os.fork()
    if child == 0:
        os.environ["RANK"] = str(number)
        try:
            rank()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


@pytest.mark.need("D7")
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_others_wait_for_the_first(parallel, tmp_path, monkeypatch):
    """In evaluation, in saving, in what follows an epoch, and at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for name, value in dict(MASTER_ADDR="127.0.0.1", WORLD_SIZE="2", OMP_NUM_THREADS="1").items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path), parallel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
