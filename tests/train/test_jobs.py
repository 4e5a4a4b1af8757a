"""Several cells at a time: the same numbers in the same order, and one clear line when a process is lost."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from test_study import MICRO

from vit2dpe.errors import ConfigError, DataError, TrainingError
from vit2dpe.train.jobs import count, each
from vit2dpe.train.study import study


def lives_or_dies(folder, cell, progress):
    """What a process does here: leaves its number in the folder, and goes as its cell says."""
    progress("said by", 0, {"process": os.getpid()})
    if cell == "dies":
        os._exit(9)
    if cell == "refuses":
        raise DataError("image 3 is unreadable")
    if cell == "takes long":
        time.sleep(60)
    (folder / cell).write_text(str(os.getpid()))
    return [{"cell": cell, "threads": torch.get_num_threads()}]


def collect(folder, cells, **options):
    said = []
    found = list(each(lives_or_dies, (folder,), [(c,) for c in cells], lambda *row: said.append(row), **options))
    return found, said


def test_each_cell_comes_back_with_its_number_and_what_it_said(tmp_path):
    found, said = collect(tmp_path, ["a", "b", "c"], jobs=2)
    assert sorted((i, rows[0]["cell"]) for i, rows in found) == [(0, "a"), (1, "b"), (2, "c")]
    assert {rows[0]["threads"] for _, rows in found} == {1}
    assert len(said) == 3
    assert os.getpid() not in {row["process"] for _, _, row in said}
    assert os.getpid() not in {int((tmp_path / c).read_text()) for c in "abc"}


def test_one_at_a_time_needs_no_other_process(tmp_path):
    collect(tmp_path, ["a"], jobs=1)
    assert int((tmp_path / "a").read_text()) == os.getpid()


@pytest.mark.parametrize(("cell", "error", "message"), [
    ("dies", TrainingError, "a process that trained a cell died"),
    ("refuses", DataError, "image 3 is unreadable"),
])  # fmt: skip
def test_a_lost_cell_ends_the_study_and_not_after_the_others(cell, error, message, tmp_path):
    with pytest.raises(error, match=message):
        collect(tmp_path, ["takes long", cell], jobs=2)
    assert not (tmp_path / "takes long").exists(), "the other process was ended, not waited for"


def test_a_lost_process_is_seen_where_the_pool_does_not_watch_it(tmp_path, monkeypatch):
    """The pool of Python 3.11.7 may list whom it watches while the last process is still being started."""
    start = ProcessPoolExecutor._spawn_process
    monkeypatch.setattr(ProcessPoolExecutor, "_spawn_process", lambda pool: (time.sleep(0.5), start(pool)))
    with pytest.raises(TrainingError, match="a process that trained a cell died"):
        collect(tmp_path, ["takes long", "dies"], jobs=2)
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
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        count(0, None, cpu, 20)


def test_a_study_of_several_processes_gives_the_numbers_of_one(tmp_path):
    small = replace(MICRO, encodings="none,relative", sizes="16", modes="scale", threads=1)
    for jobs in (1, 2):
        study(replace(small, jobs=jobs, out=str(tmp_path / str(jobs))))
    assert (tmp_path / "1/results.csv").read_bytes() == (tmp_path / "2/results.csv").read_bytes()
