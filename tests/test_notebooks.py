"""The notebooks: what is committed equals its source, has pictures and no trace of a machine, and runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

BUILD = runpy.run_path(str(Path(__file__).parent.parent / "notebooks" / "build.py"), run_name="build")
SOURCES = BUILD["sources"]()

each = pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])


def cells(notebook):
    return [(cell.cell_type, cell.id, cell.source) for cell in notebook.cells]


def outputs(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def shown_text(notebook):
    """All text that cells printed or returned; pictures are not text."""
    return "\n".join(str(out.get("text", out.get("data", {}).get("text/plain", out))) for out in outputs(notebook))


def test_there_are_notebooks():
    assert SOURCES


def test_conversion_of_the_percent_format():
    notebook = BUILD["convert"]('# a line for tools\n# %% [markdown]\n# # Title\n#\n# words\n\n# %%\nx = "# %% no"\n')
    assert cells(notebook) == [
        ("markdown", "cell-0", "# Title\n\nwords"),
        ("code", "cell-1", 'x = "# %% no"'),
    ]
    nbformat.validate(notebook)


@each
def test_what_is_committed_is_the_conversion_of_its_source(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    fresh = BUILD["convert"](source.read_text(encoding="utf-8"))
    assert cells(committed) == cells(fresh), "run: python notebooks/build.py --execute"


@each
def test_what_is_committed_was_executed_and_names_no_machine(source):
    path = source.with_suffix(".ipynb")
    committed = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in committed.cells if cell.cell_type == "code")
    assert any("image/png" in out.get("data", {}) for out in outputs(committed))
    assert not re.search(r"/(home|tmp|work|root|usr|Users)/|[A-Z]:\\", shown_text(committed))
    assert path.stat().st_size < 900_000


@pytest.mark.parametrize(  # those that train take a minute each
    "source",
    [pytest.param(path, marks=pytest.mark.slow if path.stem[0] in "23456" else [], id=path.stem) for path in SOURCES],
)
def test_it_runs(source):
    notebook = BUILD["convert"](source.read_text(encoding="utf-8"))
    BUILD["execute"](notebook)
    assert any("image/png" in out.get("data", {}) for out in outputs(notebook))
    assert not [out.text for out in outputs(notebook) if out.get("name") == "stderr"]
