"""`pytest tests/needs` runs the tests of every room that are marked with a need; `--board` prints them as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Collects from the files in which a need is marked, where this folder is what pytest was given."""
    if HERE not in [Path(config.invocation_params.dir, argument).resolve() for argument in config.args]:
        return
    config.pluginmanager.unregister(name="fault board")
    files = [file for file in sorted(HERE.parent.rglob("test_*.py")) if "need(" in file.read_text("utf-8")]
    config.args[:] = map(str, files)
    others = config.option.markexpr
    config.option.markexpr = f"need and ({others})" if others else "need"
