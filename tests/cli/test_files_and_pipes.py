"""YAML: numbers and lists where they mean the same, files of other commands. Output that nobody reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import BenchConfig
from vit2dpe.cli import main
from vit2dpe.cli.commands import COMMANDS
from vit2dpe.cli.options import options_of, settings
from vit2dpe.cli.show import ShowConfig
from vit2dpe.spec import plain
from vit2dpe.study.settings import EvaluateConfig, StudyConfig
from vit2dpe.training.pretrain_settings import PretrainConfig
from vit2dpe.training.settings import TrainConfig
from vit2dpe.training.text_settings import SampleConfig, TextTrainConfig

from .test_ranges import config_of

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.need("D13")
@pytest.mark.parametrize(
    ("config", "yaml", "args"),
    [
        (TrainConfig, "size: 32", ["--data.size", "32"]),
        (TrainConfig, "size: [32, 48]", ["--data.size", "32x48"]),
        (TrainConfig, "size: none", ["--data.size", "none"]),
        (TrainConfig, "train_sizes: [[32, 48], 16]", ["--train_sizes", "32x48,16"]),
        (TrainConfig, "augment: {policy: null}", ["--augment.policy", "none"]),
        (TrainConfig, "augment: {crop: none, flip: yes}", ["--augment.crop=none", "--augment.flip", "true"]),
        (TrainConfig, "model: {name: none, depth: null}", ["--model.name", "none", "--model.depth", "none"]),
        (TrainConfig, "optim: {lr: 1e-3, betas: [0.9, 0.95]}", ["--lr", "1e-3", "--betas", "[0.9,0.95]"]),
        (TrainConfig, "options: {qk_norm: true}", ["--options", '{"qk_norm": true}']),
        (TrainConfig, "options: '{\"qk_norm\": true}'", ["--options", '{"qk_norm": true}']),
        (TrainConfig, "run: {out: 2024, wandb: 0012}", ["--run.out", "2024", "--wandb", "0012"]),
        (TrainConfig, "optim:\naugment: null\nmodel: {}", []),
        (PretrainConfig, "augment:\n  crop: .2", ["--augment.crop", "0.2"]),
        (TextTrainConfig, "data: {source: no, target: de}", ["--data.source", "no", "--data.target", "de"]),
        (SampleConfig, "prompt: 1_000", ["--prompt", "1_000"]),
        (StudyConfig, "encodings: [none, rope]", ["--encodings", "none,rope"]),
        (StudyConfig, "encodings: none", ["--encodings", "none"]),
        (PretrainConfig, "mask_ratio: null", ["--mask_ratio", "null"]),
        (StudyConfig, "lengths: 64\nstages: [2, 2]", ["--lengths", "64", "--stages", "2,2"]),
        (EvaluateConfig, "temperatures: [null, log]", ["--temperatures", "none,log"]),
        (EvaluateConfig, "modes: scale\nsizes: [32, 48x64]", ["--modes", "scale", "--sizes", "32,48x64"]),
        (ShowConfig, "grid: 14\nencodings: [rope, alibi]", ["--grid", "14", "rope", "alibi"]),
        (ShowConfig, "encodings: rope", ["rope"]),
        (ShowConfig, "grid: [14, 20]", ["--grid", "14x20"]),
        (ShowConfig, "grid: [64]", ["--grid", "64"]),
        (TrainConfig, "optim: {betas: '0.9,0.95'}", ["--betas", "[0.9,0.95]"]),
        (TrainConfig, "betas: 0.9, 0.95", ["--optim.betas=0.9,0.95"]),
        (BenchConfig, "models: [a, b(x=1)]\nsizes: [224, 1x64]", ["--models", "a,b(x=1)", "--sizes", "224,1x64"]),
        (BenchConfig, "modes: [first]\nsizes: 96\ntable: [x]", ["--modes=first", "--sizes=96", "--table=x"]),
    ],
)
def test_yaml_means_what_is_typed(config, yaml, args, tmp_path):
    (tmp_path / "x.yaml").write_text(yaml)
    assert settings("x", config, ["--config", str(tmp_path / "x.yaml")]) == settings("x", config, args)


@pytest.mark.need("D13")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_can_be_written_to_yaml_as_it_is(command, tmp_path):
    """What `--print_config` and config.yaml hold, and every default by itself."""
    import yaml

    config = config_of(command)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(plain(config())))
    assert settings(command, config, ["--config", str(tmp_path / "x.yaml")]) == config()
    lines = [
        f"{option.name}: {yaml.safe_dump(option.default, default_flow_style=True)}" for option in options_of(config())
    ]
    (tmp_path / "y.yaml").write_text("\n".join(line.replace("\n...", "") for line in lines))
    assert settings(command, config, ["--config", str(tmp_path / "y.yaml")]) == config()


@pytest.mark.need("D13")
@pytest.mark.parametrize(
    "text", ["run: {wandb: true}", "run: {out: false}", "optim: {epochs: 2.5}", "model: {pool: [avg]}"]
)
def test_what_does_not_mean_the_same_is_refused(text, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "x.yaml")]) == 2
    assert "must be of type" in capsys.readouterr().err


@pytest.mark.need("D17")
@pytest.mark.parametrize(
    ("recipe", "command", "right"),
    [
        ("cifar10_vit_tiny", "text train", "train"),
        ("cifar10_vit_tiny", "pretrain", "train"),
        ("cifar10_mae_pretrain", "train", "pretrain"),
        ("cifar10_mae_pretrain", "study", "pretrain"),
        ("shakespeare_masked", "train", "text train"),
        ("shakespeare_masked", "text sample", "text train"),
        ("study_digits", "train", "study"),
        ("study_digits", "evaluate", "study"),
    ],
)
def test_a_recipe_of_another_command(recipe, command, right, capsys):
    path = str(RECIPES / f"{recipe}.yaml")
    assert main([*command.split(), "--config", path]) == 2
    error = capsys.readouterr().err
    assert f"{path} is for another command" in error
    assert error.endswith(f": vit2dpe {right} --config {path}\n")


@pytest.mark.need("D17")
def test_a_recipe_of_train_given_to_study(capsys, monkeypatch):
    """Its settings are those of a study too, but for what is trained."""
    monkeypatch.setattr("vit2dpe.study.run.prepare", None)
    assert main(["study", "--config", str(RECIPES / "digits_quick.yaml")]) == 2
    assert "vit2dpe train --config" in capsys.readouterr().err


@pytest.mark.need("D17")
def test_a_key_that_no_command_has(tmp_path, capsys):
    for text, near in [
        ("widht: 3", "known: "),
        ("model: {widht: 3}", "did you mean 'model.width'"),
    ]:
        (tmp_path / "x.yaml").write_text(text)
        assert main(["study", "--config", str(tmp_path / "x.yaml")]) == 2
        error = capsys.readouterr().err
        assert near in error
        assert not {"-h", "-h,", "help", "config,"} & set(error.split())


@pytest.mark.need("D16")
@pytest.mark.parametrize("args", [["study", "--help"], ["--help"], ["report", "x"], ["--version"]])
def test_output_that_nobody_reads(args, tmp_path):
    """The reader has gone before anything is written: no word, and the status of a tool that SIGPIPE ends."""
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from vit2dpe.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    if args == ["report", "x"]:  # what is wrong is said all the same
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    else:
        assert (done.returncode, done.stderr) == (141, "")
