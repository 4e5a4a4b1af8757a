"""Real kills. A checkpoint is always whole, and a training that was killed anywhere ends at the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

fault = pytest.mark.fault
ROOT = Path(__file__).parents[2]
if not hasattr(os, "fork"):
    pytest.skip("trials fork, which this system cannot", allow_module_level=True)


def trials(what, folder, count):
    command = [sys.executable, "-m", "tests.faults.killing", what, str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@fault("F48")
def test_killed_at_random_times_the_last_checkpoint_is_whole(tmp_path):
    """Twenty here; for more: python -m tests.faults.killing random <folder> 200."""
    found = trials("random", tmp_path, 20)
    steps = [trial["step"] for trial in found]
    assert len(steps) == 20
    assert steps == sorted(set(steps)), "every one of them wrote"
    assert all(trial["left"] == [] for trial in found)


@fault("F49")
def test_killed_at_every_contact_with_the_disk_it_is_whole(tmp_path):
    found = trials("boundaries", tmp_path, 200)
    assert found[-1]["finished"], "every boundary was met"
    killed = found[:-1]
    assert len(killed) > 15
    steps = [trial["step"] for trial in killed]
    assert set(steps) == {1, 2}
    assert steps == sorted(steps), "there is one moment at which the new one takes the place of the old"
    assert all(trial["left"] == [] for trial in found)


@fault("F52", "F53")
def test_killed_or_stopped_at_random_times_a_training_ends_at_the_same_bits(tmp_path):
    found = trials("trainings", tmp_path, 20)
    assert len(found) == 20
    assert all(trial["again"] == 0 for trial in found)
    assert all(trial["same"] for trial in found), found
    assert len({trial["step"] for trial in found}) > 4, "they were stopped at different places"
    asked = [trial for trial in found if trial["signal"] != signal.SIGKILL]
    assert {trial["status"] for trial in asked} <= {0, 143, 130, -15, -2}
    assert {143, 130} & {trial["status"] for trial in asked}
