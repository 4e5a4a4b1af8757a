"""Every recipe is read, is of a command, says its command and what to expect, and its model can be built."""

from pathlib import Path

import pytest
import torch
import yaml

from vit2dpe.cli import COMMANDS, main
from vit2dpe.train import train as module
from vit2dpe.train.settings import TrainConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_its_command_and_what_to_expect(path):
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"recipes/{path.name}" in header
    assert any(f"vit2dpe {command} --config" in header for command in COMMANDS)
    assert "Expected" in header
    assert "Hardware" in header or "hardware" in header or "GPU" in header


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
    size = module.parse_size(config.data.size)
    with torch.device("meta"):
        model = module.model_spec(module.resolve(config), size, 3, 10).build()
        out = model(torch.zeros(2, 3, *size))
    assert out.shape == (2, 10)


def test_the_quick_one_runs(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--config", str(RECIPES / "digits_quick.yaml"), "--smoke", "--run.out", str(out)]) == 0
    assert (out / "summary.md").is_file()
    assert "next     vit2dpe train" in capsys.readouterr().out
