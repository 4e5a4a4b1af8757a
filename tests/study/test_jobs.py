"""Several trials at a time: the same numbers in the same order, and one clear line when a process is lost."""

import os
import subprocess
import sys
import time
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch

from tests.study.lives_or_dies import lives_or_dies
from tests.study.test_study import MICRO
from vit2dpe.errors import DataError, TrainingError
from vit2dpe.study import StudyConfig, study
from vit2dpe.study.jobs import count, each

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """What torch would take in a new process by itself: neither what is asked for here, nor the default of several."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


def collect(folder, trials, **options):
    said = []
    found = list(each(partial(lives_or_dies, folder), trials, lambda *row: said.append(row), **options))
    return found, said


def test_each_trial_comes_back_with_its_number_and_what_it_said(tmp_path):
    found, said = collect(tmp_path, ["a", "b", "c"], jobs=2, threads=2)
    assert sorted((i, rows[0]["trial"]) for i, rows in found) == [(0, "a"), (1, "b"), (2, "c")]
    assert {rows[0]["threads"] for _, rows in found} == {2}
    assert len(said) == 3
    assert os.getpid() not in {row["process"] for _, _, row in said}
    assert os.getpid() not in {int((tmp_path / c).read_text().split()[0]) for c in "abc"}


def test_one_at_a_time_needs_no_other_process(tmp_path):
    before = torch.get_num_threads()
    try:
        collect(tmp_path, ["a"], jobs=1, threads=before + 1)
        assert (tmp_path / "a").read_text() == f"{os.getpid()} {before + 1}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("trial", "error", "message"), [
    ("dies", TrainingError, "a process that trained a trial died"),
    ("refuses", DataError, "image 3 is unreadable"),
])  # fmt: skip
def test_a_lost_trial_ends_the_study_and_not_after_the_others(trial, error, message, tmp_path):
    with pytest.raises(error, match=message):
        collect(tmp_path, ["takes long", "a", trial], jobs=2)
    assert not (tmp_path / "takes long").exists(), "the other process was ended, not waited for"
    assert (tmp_path / "a").read_text().endswith(" 1"), "one thread each, where nothing is said; and kept"


def test_a_process_that_is_lost_while_others_start_is_seen(tmp_path, monkeypatch):
    """The pool of Python 3.11.7 lists whom it watches while it starts the last one, and then waits for ever."""
    start = SpawnProcess.start
    monkeypatch.setattr(SpawnProcess, "start", lambda process: (start(process), time.sleep(5)))
    with pytest.raises(TrainingError, match="a process that trained a trial died"):
        collect(tmp_path, ["dies", "takes long"], jobs=2)
    assert not (tmp_path / "takes long").exists()


def test_an_error_says_where_in_the_process_it_was_raised(tmp_path):
    with pytest.raises(DataError) as error:
        collect(tmp_path, ["a", "refuses"], jobs=2)
    assert str(error.value) == "image 3 is unreadable"
    assert "in lives_or_dies" in error.value.__notes__[0]


def test_processes_do_not_outlive_a_study_that_is_killed(tmp_path):
    """They share its output, which ends when the last of them has ended."""
    parent = subprocess.Popen([sys.executable, "-m", "tests.study.lives_or_dies", tmp_path], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert parent.stdout is not None
    assert {parent.stdout.readline() for _ in range(2)} == {"takes long\n"}
    parent.kill()
    assert parent.communicate(timeout=200)[0] == "", "ended, and before their five minutes were over"
    assert not (tmp_path / "takes long").exists()


def test_how_many_at_a_time(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert count(None, None, cpu, 20) == 6
    assert count(None, 2, cpu, 20) == 3
    assert count(None, 16, cpu, 20) == 1
    assert count(None, None, cpu, 2) == 2
    assert count(None, None, cuda, 20) == 1
    assert count(4, None, cuda, 20) == 4
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert count(None, None, cpu, 20) == 8, "without being asked"
    assert count(12, None, cpu, 20) == 12


def test_a_study_of_several_processes_gives_the_numbers_of_one(tmp_path):
    small = dict(MICRO, encodings="none,relative", sizes="16", modes="scale", threads=1)
    for jobs in (1, 2):
        study(StudyConfig.of(small, jobs=jobs, out=str(tmp_path / str(jobs))))
    assert (tmp_path / "1/results.csv").read_bytes() == (tmp_path / "2/results.csv").read_bytes()
