"""Every block of the README runs: python in one namespace, `vit2dpe` commands as smoke runs, the rest is CI's own."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from vit2dpe.cli import main
from vit2dpe.encodings import ENCODINGS

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
# What .ci/run does with its own hands, in a fresh environment.
BY_CI = {'pip install -e ".[recipes]"', 'pip install -e ".[test]" && pytest -n 2'}


@pytest.fixture
def class_folders(tmp_path):
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for j in range(4):
                Image.new("RGB", (64, 64), (60 * i, 40 * j, 0)).save(tmp_path / split / name / f"{j}.png")
    return tmp_path


def test_python_blocks_run_in_order(monkeypatch):
    monkeypatch.delitem(ENCODINGS, "near", raising=False)
    monkeypatch.setattr("vit2dpe.encodings.ENCODINGS", ENCODINGS)
    module = types.ModuleType("readme")  # classes defined in it can be pickled, as those of a user's file
    monkeypatch.setitem(sys.modules, "readme", module)
    namespace = vars(module)
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert len(blocks) >= 5
    try:
        for text in blocks:
            exec(compile(text, "README.md", "exec"), namespace)
    finally:
        ENCODINGS.pop("near", None)
    assert tuple(namespace["signal"].token.shape) == (1, 281, 192)


COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line, class_folders, monkeypatch, capsys):
    if line in BY_CI:
        install = line.split(" && ")[0].removeprefix("pip install -e ")
        assert install in (ROOT / ".ci/run").read_text() or install == '".[recipes]"'  # a part of [test]
        return
    program, *args = shlex.split(line)
    assert program == "vit2dpe"
    args = [str(class_folders) if arg in ("path/to/images", "photos") else arg for arg in args]
    args = [str(ROOT / arg) if arg.startswith("recipes/") else arg for arg in args]
    monkeypatch.chdir(class_folders)
    smoke = {"study": ["--smoke", "--width", "16", "--depth", "1", "--heads", "2"], "train": ["--smoke"]}
    assert main([*args, *smoke.get(args[0], [])]) == 0, capsys.readouterr().err
    wanted = "runs/*/best/model.safetensors" if args[0] == "train" else "*.png"
    assert list(class_folders.rglob(wanted)), sorted(class_folders.rglob("*"))


def test_the_readme_names_every_encoding():
    text = (ROOT / "README.md").read_text()
    missing = [name for name in ENCODINGS if f"`{name}`" not in text]
    assert missing == [], "name them in README.md, in the list of words"
