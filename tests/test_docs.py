"""The generated table is current, and the code on the pages runs."""

import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import timm

from vit2dpe.encodings import ENCODINGS
from vit2dpe.models.families import FAMILIES

DOCS = Path(__file__).parent.parent / "docs"


def test_the_table_of_encodings_is_what_they_declare():
    page = runpy.run_path(str(DOCS / "build_tables.py"))["page"]()
    assert (DOCS / "encodings.md").read_text() == page.rstrip() + "\n", "run: python docs/build_tables.py"
    assert all(f"| `{name}` |" in page for name in ENCODINGS)


def test_the_table_of_timms_families_is_what_the_readers_take():
    """Held to the letter for the timm it was built with; another timm may register other names."""
    page, built = (DOCS / "timm.md").read_text(), runpy.run_path(str(DOCS / "build_timm.py"))
    assert all(f"| `{family}` |" in page for family in FAMILIES)
    if f"families of timm {timm.__version__};" in page:
        assert page == built["page"](), "run: python docs/build_timm.py"


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda p: p.stem)
def test_code_on_the_pages_runs(path, monkeypatch):
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    before = dict(ENCODINGS)
    try:
        for text in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S):
            exec(compile(text, str(path), "exec"), vars(module))
    finally:
        ENCODINGS.clear()
        ENCODINGS.update(before)
