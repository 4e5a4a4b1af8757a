"""Every recipe is read, is of a command, says its command and what to expect, and its model can be built."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from vit2dpe.cli.commands import COMMANDS, main
from vit2dpe.training.log import read_table
from vit2dpe.training.objectives import images as module
from vit2dpe.training.settings import TrainConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_and_what_to_expect(path):
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"recipes/{path.name}" in header
    assert any(f"vit2dpe {command} --config" in header for command in COMMANDS)
    assert "Expected" in header
    assert "hardware" in header.lower()
    assert re.search(r"minutes|\d min", header)


def classifiers():
    return [path for path in FILES if f"vit2dpe train --config recipes/{path.name}" in path.read_text()]


@pytest.mark.parametrize("path", classifiers(), ids=lambda path: path.stem)
def test_a_classifiers_recipe_can_be_started(path, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(module, "train", lambda config, command: seen.append(config))
    # A machine without a GPU reads it as well; the rest is as the recipe says.
    assert main(["train", "--config", str(path), "--data.root=null", "--run.device", "cpu"]) == 0
    config: TrainConfig = seen[0]
    given = yaml.safe_load(path.read_text())
    assert config.optim.lr == given["optim"]["lr"], "numbers are written so that YAML reads numbers"
    assert module.check(config)
    size = config.data.size
    with torch.device("meta"):
        model = module.model_spec(module.resolve(config).model, size, 3, 10).build()
        out = model(torch.zeros(2, 3, *size))
    assert out.shape == (2, 10)


def micro(folder, side):
    """Two classes of four pictures to train on and two to test, of this side."""
    for split, n in (("train", 4), ("val", 2)):
        for label, name in enumerate("ab"):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (side, side), (200 * label, 20 * i, 0)).save(folder / split / name / f"{i}.png")
    return str(folder)


def of(*commands):
    found = [(path, command) for path in FILES for command in commands]
    return [(path, c) for path, c in found if f"vit2dpe {c} --config recipes/{path.name}" in path.read_text()]


@pytest.mark.parametrize(
    ("path", "command"), of("train", "pretrain"), ids=lambda value: getattr(value, "stem", str(value))
)
def test_two_steps_of_a_recipe(path, command, tmp_path, monkeypatch):
    """As it is, but for one block, two classes of pictures, and batches of four; what follows from it too."""
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))
    given = yaml.safe_load(path.read_text())
    data, model = given["data"], given["model"]
    side = int(data.get("source_size") or data["size"])
    words = ["--config", str(path), "--smoke", "--optim.batch_size", "4", "--run.out", str(tmp_path / "run")]
    if data["name"] != "digits":
        words += ["--data.name", "folder", "--data.root", micro(tmp_path / "data", side)]
    shrunk = {"depths": [1, 1, 1]} if "swin" in model.get("name", "") else {"depth": 1}
    words += ["--model.options", json.dumps(shrunk)] if "name" in model else ["--model.depth", "1"]
    assert main([command, *words]) == 0
    assert read_table(tmp_path / "run/metrics.csv")[0]["step"] == 2
    assert (tmp_path / "run/summary.md").is_file()


@pytest.mark.parametrize(("path", "command"), of("study"), ids=lambda value: getattr(value, "stem", str(value)))
def test_two_steps_of_a_study(path, command, tmp_path, monkeypatch):
    """One encoding, one block, its smallest size."""
    given = yaml.safe_load(path.read_text())
    if given.get("task", "images") != "images":
        pytest.skip("a study of text: tests/study/test_text_study.py")
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))
    smallest = given["sizes"].split(",")[0]
    encoding = "learned" if "training" in given else "rope"  # parts of a table are of tables
    words = ["--config", str(path), "--smoke", "--encodings", encoding, "--sizes", smallest, "--modes", "scale"]
    words += ["--depth", "1", "--seeds", "1", "--batch_size", "4", "--device", "cpu", "--out", str(tmp_path / "out")]
    words += ["--jobs", "1", *(["--stages", "1,1"] if given.get("arch") == "swin" else [])]
    if given["data"] != "digits":
        words += ["--data", "folder", "--root", micro(tmp_path / "data", int(given["train_size"]))]
    assert main(["study", *words]) == 0
    policies = {row["policy"] for row in read_table(tmp_path / "out/results.csv")}
    assert ("finetuned" in policies) == bool(given.get("finetune"))


def test_the_quick_one_runs(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(RECIPES / "digits_quick.yaml"), "--smoke", "--run.out", str(out)]) == 0
    assert (out / "summary.md").is_file()
    assert "next     vit2dpe train" in capsys.readouterr().out


def test_which_digit_came_first(tmp_path):
    """Videos are a pure function of their key, of another length the same; what is measured is not measured again."""
    recipe = runpy.run_path(str(RECIPES / "video_frames.py"), run_name="recipe")
    short, long = (recipe["videos"]("test", 5, frames, 0) for frames in (8, 32))
    assert torch.equal(short[1], long[1])
    assert all(torch.equal(a, b) for a, b in zip(short, recipe["videos"]("test", 5, 8, 0), strict=True))
    apart = short[0] - long[0][:, :, ::4]
    assert apart.std() < 2 * recipe["NOISE"], "the same digits at the same parts of the video, but for the noise"
    pairs = long[0].unflatten(2, (16, 2)).diff(dim=3)
    assert pairs.abs().max() < 8 * recipe["NOISE"], "digits change between tubelets"
    words = ["--out", str(tmp_path), "--seeds", "1", "--steps", "2", "--n", "20", "--encodings"]
    recipe["main"]([*words, "learned"])
    before = (tmp_path / "frames.csv").read_text()
    recipe["main"]([*words, "learned,none"])
    rows = read_table(tmp_path / "frames.csv")
    assert (tmp_path / "frames.csv").read_text().startswith(before)
    assert [(row["encoding"], row["policy"]) for row in rows[::3]] == [
        ("learned", "resize"),
        ("learned", "interpolate"),
        ("none", "extrapolate"),
    ]
    assert {row["frames"] for row in rows} == {8, 16, 32}
