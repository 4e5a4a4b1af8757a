"""Processes under torchrun wait for the one that works alone at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

CODE = """
import sys, time, torch
from vit2dpe.training.distributed import process_group
with process_group(torch.device("cpu"), timeout_s=2, wait_minutes=float(sys.argv[1])) as world:
    time.sleep(4 * world.first)
"""


@pytest.mark.need("D7")
def test_the_others_wait_for_the_first():
    """For longer than an exchange may take, which is 2 s here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", CODE, "1"]
    ranks = [
        subprocess.Popen(command, env=world | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
