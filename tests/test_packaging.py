"""What is installed: files of the wheel and of the sdist, their metadata, and the commands without any extra."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
hatchling = pytest.importorskip("hatchling.build", reason="hatchling, of the extra test, builds what is installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist of this tree."""
    folder, before = tmp_path_factory.mktemp("built"), Path.cwd()
    os.chdir(ROOT)
    try:
        hatchling.build_wheel(str(folder))
        hatchling.build_sdist(str(folder))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_string(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode())


def files(folder):
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path) for path in found if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}


def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else(wheel):
    recipes = {path.name: path.read_bytes() for path in (ROOT / "recipes").glob("*.yaml")}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files("vit2dpe") | {f"vit2dpe/recipes/{name}" for name in recipes}
    assert {"vit2dpe/py.typed", "vit2dpe/study/report.html"} <= packed
    assert all(wheel.read(f"vit2dpe/recipes/{name}") == text for name, text in recipes.items())


def test_the_sdist_holds_the_tests_and_what_they_read(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("vit2dpe", "tests", "recipes", "benchmarks", "docs", "notebooks", "tools", ".ci")
    assert set().union(*map(files, folders)) <= packed
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml", "pyproject.toml"} <= packed


def test_the_readme_of_an_index_leads_nowhere_that_does_not_exist(metadata):
    """Outside of the repository a relative link or picture is dead; code is as it was."""
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text()
    code = re.compile(r"^```.*?^```", flags=re.M | re.S)
    assert code.findall(text) == code.findall(readme)
    prose = code.sub("", text)
    assert re.findall(r"\]\((?!https://)", prose) == []
    assert "as `vit2dpe study` drew it" not in prose, "the caption goes with its picture"
    assert "docs/encodings.md" in prose
    assert prose.count("\n#") == code.sub("", readme).count("\n#")


def test_the_metadata_are_those_of_the_package(metadata):
    from vit2dpe import __version__

    assert metadata["Version"] == __version__
    assert metadata["Metadata-Version"] == "2.4"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Author"]


def test_what_a_module_imports_at_its_top_is_required(metadata):
    """Not left to come along with something else."""
    required = {r.name for r in map(Requirement, metadata.get_all("Requires-Dist")) if r.marker is None}
    imported = set()
    for path in (ROOT / "vit2dpe").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    owners = packages_distributions()
    missing = {
        name: owners[name]
        for name in imported
        - set(sys.stdlib_module_names)
        - {"vit2dpe", "triton"}  # triton is torch's own, and there on a GPU
        if not {owner.lower() for owner in owners[name]} & required
    }
    assert missing == {}


# Extras are hidden as if they were not installed, before anything is imported.
WITHOUT_EXTRAS = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = {"matplotlib", "sklearn", "tokenizers", "sacrebleu", "tensorboard", "wandb"}
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
from vit2dpe.cli import main
from vit2dpe.cli.commands import COMMANDS
def status(*words):
    try:
        return main(words)
    except SystemExit as end:
        return end.code
helps = [status(*name.split(), "--help") for name in COMMANDS]
heavy = sorted({"torch", "timm"} & set(sys.modules))
"""


def test_an_installed_package_without_extras(built, wheel, tmp_path):
    """Unpacked away from the clone: every help, the recipes, doctor and report; what is missing is named."""
    site, study = tmp_path / "site", ROOT / "recipes/results/study_digits"
    wheel.extractall(site)
    code = WITHOUT_EXTRAS + (
        "import vit2dpe\n"
        "last = [status('recipes'), status('train', '--recipe', 'digits_quick', '--print_config'), status('bench'),\n"
        f"    status('doctor'), status('report', {str(study)!r}), status('show', 'rope'), status('study', '--smoke'),\n"
        "    status('pretrain', '--smoke')]\n"
        "print(helps, heavy, last, vit2dpe.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    from vit2dpe.cli.commands import COMMANDS

    statuses = [0] * len(COMMANDS), [], [0, 0, 2, 0, 0, 2, 2, 2]
    assert run.stdout.splitlines()[-1] == " ".join(map(str, statuses)) + f" {site / 'vit2dpe/__init__.py'}", run.stderr
    assert (tmp_path / "report.html").is_file()
    assert "vit2dpe train --recipe digits_quick" in run.stdout
    bench, *missing = run.stderr.splitlines()
    assert "runs in a clone of the repository" in bench
    assert len(missing) == 3
    assert all('pip install "vit2dpe[recipes]"' in line for line in missing)
