"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.boards import Board
from tests.faults.rows import FAULTS
from tests.needs.rows import NEEDS, OPEN

torch.set_num_threads(1)  # `pytest -n 2` has a process for each core


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for decoded images and downloads, of this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VIT2DPE_CACHE", str(folder))
    return folder


# Of tests marked `one_of_each_kind`, which take seconds for each encoding: these by default, `-m slow` for the others.
KINDS = {"none", "learned", "relative", "alibi", "rope_mixed", "sincos+rope_mixed"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--board", action="store_true", help="print the tables of faults and of needs")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Board("fault", FAULTS), "fault board")
    config.pluginmanager.register(Board("need", NEEDS, OPEN), "need board")
    config.addinivalue_line("markers", f"one_of_each_kind: slow, but for the encodings {', '.join(sorted(KINDS))}")


@pytest.hookimpl(tryfirst=True)  # before the option -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `one_of_each_kind` leaves out.

    Raises:
        UsageError: for a marked test that has no encoding among its parameters.
    """
    for item in items:
        if item.get_closest_marker("one_of_each_kind"):
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            encodings = {value for value in parameters if isinstance(value, str)}
            if not encodings:
                raise pytest.UsageError(f"{item.nodeid} is one_of_each_kind without an encoding as a parameter")
            if not encodings & KINDS:
                item.add_marker(pytest.mark.slow)
