"""The board counts: a fault is right when all tests of it passed, whoever ran them; anything else is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
fault = pytest.mark.fault

@pytest.fixture
def broken():
    raise OSError("no set-up")

@pytest.fixture
def untidy():
    yield
    raise OSError("no way back")

@fault("F01")
@pytest.mark.parametrize("i", [0, 1])
def test_two(i): pass

@fault("F02", "F03")
def test_of_two_faults(): pass

@fault("F04")
def test_fails(): raise ValueError("no")

@fault("F05")
@pytest.mark.parametrize("good", [True, False])
def test_half(good):
    if not good:
        raise ValueError("no")

@fault("F06")
def test_skipped(): pytest.skip("not here")

@fault("F07")
def test_set_up(broken): pass

@fault("F08")
def test_left_behind(untidy): pass

@fault("F09")
@pytest.mark.xfail
def test_expected_to_fail(): raise ValueError("no")

def test_of_no_fault(): pass
"""
EXPECTED = {
    "F01": "right (2)",
    "F02": "right (1)",
    "F03": "right (1)",
    "F04": "WRONG (failed)",
    "F05": "WRONG (failed, passed)",
    "F06": "WRONG (skipped)",
    "F07": "WRONG (failed)",
    "F08": "WRONG (failed, passed)",
    "F09": "WRONG (skipped)",
    "F10": "not run",
    "F11": "open, later",
}


CONFTEST = """
from tests.boards import Board

def pytest_addoption(parser):
    parser.addoption("--board", action="store_true")

def pytest_configure(config):
    rows = {f"F{i:02}": ("what happens", "what is promised") for i in range(1, 12)}
    config.pluginmanager.register(Board("fault", rows, {"F11": "open, later"}))
"""


def board(folder, tests, *words):
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, "test_some.py"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    clean["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["one", "two"])
def test_the_board_counts(tmp_path, processes):
    done = board(tmp_path, TESTS, "--board", *processes)
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("F") and " | " in line]
    said = {line[0].strip(): line[-1].strip() for line in lines}
    assert said == EXPECTED
    assert "3 of 11 right" in done.stdout


def test_without_being_asked_it_is_silent_and_a_fault_that_is_none_is_refused(tmp_path):
    unknown = TESTS + "\n@fault('F12')\ndef test_misspelt(): pass\n"
    done = board(tmp_path, unknown)
    assert done.returncode == 4
    assert "test_misspelt is marked fault F12: no row of that board" in done.stderr
    assert "right" not in done.stdout
