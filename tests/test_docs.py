"""Generated pages are current, the code on the pages runs, its commands are understood, and the site is built."""

import inspect
import pkgutil
import re
import runpy
import shlex
import sys
import tomllib
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timm

import vit2dpe
from vit2dpe.cli import commands as cli
from vit2dpe.encodings import ENCODINGS
from vit2dpe.interop.timm.read import FAMILIES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# All pages of the site but the README, whose code tests/test_readme.py runs, and what a repository shows beside it.
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in ("CONTRIBUTING.md", "recipes/RESULTS.md"))]
PAGES.append(ROOT / "benchmarks" / "README.md")
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)
TABLES = runpy.run_path(str(DOCS / "build_tables.py"))["PAGES"]


@pytest.mark.parametrize(  # that of the models builds and counts each
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "models.md" else []) for name in TABLES]
)
def test_generated_pages_are_current(name):
    assert (DOCS / name).read_text() == TABLES[name]().rstrip() + "\n", "run: python docs/build_tables.py"


def test_every_encoding_is_in_the_tables():
    for name in ("encodings.md", "models.md"):
        assert all(f"| `{word}` |" in (DOCS / name).read_text() for word in ENCODINGS)


def test_the_table_of_timms_families_is_what_the_readers_take():
    """Held to the letter for the timm it was built with; another timm may register other names."""
    page, built = (DOCS / "timm.md").read_text(), runpy.run_path(str(DOCS / "build_timm.py"))
    assert all(f"| `{family}` |" in page for family in FAMILIES)
    if f"families of timm {timm.__version__};" in page:
        assert page == built["page"](), "run: python docs/build_timm.py"


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_no_block_of_code_escapes_the_tests(path):
    """Each fence opens at the start of a line and says python, which is run, or bash, whose commands are read."""
    fences = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("```", "~~~"))]
    assert set(fences[::2]) <= {"```python", "```bash"}
    assert set(fences[1::2]) <= {"```"}


@pytest.mark.parametrize("path", [p for p in PAGES if PYTHON.search(p.read_text())], ids=lambda p: p.stem)
def test_code_on_the_pages_runs(path, monkeypatch):
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    before = dict(ENCODINGS)
    try:
        for text in PYTHON.findall(path.read_text()):
            exec(compile(text, str(path), "exec"), vars(module))
    finally:
        ENCODINGS.clear()
        ENCODINGS.update(before)


def commands(text):
    """Every command in a block, fenced or indented, or in a sentence; what follows three spaces is said about it."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    indented = re.findall(r"^    (?=\S)(?:.*\\\n)*.*$", PYTHON.sub("", text), flags=re.M)
    spoken = [" ".join(words.split()) for words in re.findall(r"`(vit2dpe [^`]+ [^`]+)`", text)]
    for line in "\n".join([*fenced, *indented]).replace("\\\n", "").splitlines() + spoken:
        line = re.split(r" {3,}", line.strip())[0].removesuffix(" ...")
        line = re.sub(r"^torchrun --nproc-per-node \d+ -m ", "", re.sub(r"<[^>]*>", "folder", line))
        yield from filter(None, line.split(" && "))


BY_PAGE = {
    path: list(commands(path.read_text())) for path in [*PAGES, ROOT / "README.md"] if path.name != "encodings.md"
}
WRITTEN = [
    pytest.param(line, id=f"{path.stem}-{i}")
    for path, lines in BY_PAGE.items()
    for i, line in enumerate(lines)
    if line.startswith("vit2dpe ") and not line.endswith("--help")
]
PROGRAMS = {"pip", "pytest", "ruff", "mypy", "mkdocs", "python", "benchmarks/cpu.sh"}


@pytest.mark.parametrize("path", BY_PAGE, ids=lambda p: p.stem)
def test_commands_of_others_name_what_is_there(path):
    """Files of the repository and the extras of the package; what they do is proved by the tests that they name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in BY_PAGE[path]:
        program, *words = line.split()
        if program not in PROGRAMS:
            continue  # read above, or a formula
        for word in words:
            if re.match(r"(tests|benchmarks|recipes|docs|notebooks|vit2dpe)/", word):
                assert (ROOT / word).exists(), line
            if found := re.match(r'"?\.\[(.*)\]', word):
                assert set(found[1].split(",")) <= set(extras), line


@pytest.mark.parametrize("line", WRITTEN)
def test_commands_on_the_pages_are_understood(line, monkeypatch):
    """Up to the point where work would begin: options exist, recipes are there, settings have their types."""
    real, seen = cli._named, []

    def named(where):
        found = real(where)
        return found if isinstance(found, type) else lambda *args, **_: seen.append(args) or 0

    monkeypatch.setattr(cli, "_named", named)
    monkeypatch.setattr("vit2dpe.encodings.own.import_encodings", lambda source: [])  # near.py is the reader's
    monkeypatch.chdir(ROOT)
    if line.endswith("--print_config"):  # which ends by itself
        with pytest.raises(SystemExit, match="0"):
            cli.main(shlex.split(line)[1:])
        return
    assert cli.main(shlex.split(line)[1:]) == 0
    assert len(seen) == 1


def test_the_evaluation_on_the_page_of_sizes_runs(tmp_path, capsys):
    """Understood is not enough: a model and data have to fit each other."""
    line = next(line for line in BY_PAGE[DOCS / "resize.md"] if line.startswith("vit2dpe evaluate"))
    few = ["--limit", "10", "--policies", "default", "--out", str(tmp_path)]
    assert cli.main([*shlex.split(line)[1:], *few]) == 0, capsys.readouterr().err
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2 * 2  # sizes and modes


class Fetched(HTMLParser):
    """What a browser gets by itself on opening a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if (key == "src" or (key == "href" and tag == "link")) and value and "://" in value:
                self.found.append(value)


def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path, monkeypatch):
    import logging

    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    log = logging.getLogger("mkdocs")
    log.addHandler(handler)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        log.removeHandler(handler)
    assert not told
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    fetched = {path.name: found for path in pages if (found := Fetched(path.read_text()).found)}
    assert not fetched
    assert "iframe-worker.js" in (tmp_path / "index.html").read_text()
    broken = {path.name: found for path in pages if (found := [h for h in headings(path) if "[" in h and "(" not in h])}
    assert not broken
    assert {"rope_golden", "rope_dinov3", "lookhere"} <= set(headings(tmp_path / "encodings.html"))
    drawn = (tmp_path / "notebooks" / "4_mae.html").read_text()
    assert drawn.count('<img alt="what the cell above drew"') == len(list((tmp_path / "notebooks").glob("4_mae_*.png")))
    assert '<span class="whole">--encodings</span>' in (tmp_path / "index.html").read_text()


def headings(path):
    """The headings of a page as text."""
    found = re.findall(r"<h[1-6][^>]*>(.*?)</h[1-6]>", path.read_text(), flags=re.S)
    return [re.sub(r"<[^>]*>", "", heading).replace("&para;", "").strip() for heading in found]


def test_the_api_pages_list_names_not_modules():
    names = [
        line.removeprefix("::: ").strip()
        for page in sorted((ROOT / "docs/api").glob("*.md"))
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    ]
    things = {name: pkgutil.resolve_name(name) for name in names}
    assert [name for name, thing in things.items() if inspect.ismodule(thing)] == []
    assert len(names) == len(set(names))
    left_out = {name for name in vit2dpe.__all__ if not any(getattr(vit2dpe, name) is t for t in things.values())}
    assert left_out == set(), "public names of vit2dpe without a place in docs/api"
