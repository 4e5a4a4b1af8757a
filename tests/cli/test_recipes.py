"""`--recipe NAME` is the file of that name, with its presets, and `vit2dpe recipes` lists what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from vit2dpe.cli import commands, main

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if "." not in path.stem]


def printed(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--print_config"])
    return capsys.readouterr().out


def test_a_recipe_by_its_name_is_its_file(capsys):
    file, preset = str(RECIPES / "study_text.yaml"), str(RECIPES / "study_text.cpu.yaml")
    assert printed(capsys, "study", "--recipe", "study_text") == printed(capsys, "study", "--config", file)
    by_name = printed(capsys, "study", "--recipe=study_text", "--preset", "cpu", "--seeds", "7")
    assert by_name == printed(capsys, "study", "--config", file, "--config", preset, "--seeds", "7")
    assert "seeds: 7" in by_name
    assert "runs/study_text_cpu" in by_name


def test_settings_that_were_printed_are_read_again(capsys, tmp_path):
    """--recipe, --preset and --import are no settings, and no keys of them."""
    for words in (["train", "--recipe", "digits_quick"], ["study", "--quick"]):
        text = printed(capsys, *words)
        assert not {"recipe", "preset", "import"} & set(yaml.safe_load(text))
        (tmp_path / "printed.yaml").write_text(text)
        again = printed(capsys, words[0], "--config", str(tmp_path / "printed.yaml"))
        assert yaml.safe_load(again) == yaml.safe_load(text)


def test_all_recipes_are_listed_with_commands_that_are_understood(capsys, monkeypatch):
    assert main(["recipes"]) == 0
    listed = re.findall(r"^(vit2dpe .*?--recipe (\w+))(?: \[--preset ([\w|]+)\])?$", capsys.readouterr().out, re.M)
    assert [name for _, name, _ in listed] == NAMES
    assert {name for _, name, presets in listed if presets == "cpu"} == {
        path.name.partition(".")[0] for path in RECIPES.glob("*.cpu.yaml")
    }
    real, seen = commands._named, []
    settings = {command.config for command in commands.COMMANDS.values()}
    monkeypatch.setattr(commands, "_named", lambda at: real(at) if at in settings else lambda *_, **__: seen.append(at))
    for line, _, presets in listed:
        assert main(shlex.split(line)[1:]) == 0
        assert not presets or main([*shlex.split(line)[1:], "--preset", presets]) == 0
    assert len(seen) == len(NAMES) + len(list(RECIPES.glob("*.*.yaml")))


def test_a_recipe_is_printed_to_start_from(capsys):
    assert main(["recipes", "digits_quick"]) == 0
    assert capsys.readouterr().out.strip() == (RECIPES / "digits_quick.yaml").read_text().strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --recipe digits_quik", "unknown recipe 'digits_quik'; did you mean 'digits_quick'"),
        ("recipes digits_quik", "unknown recipe 'digits_quik'; did you mean 'digits_quick'"),
        ("train --recipe study_digits", "study_digits.yaml is for another command, which has encodings: vit2dpe study"),
        (
            "train --recipe shakespeare_char.cpu",
            "unknown recipe 'shakespeare_char.cpu'; did you mean 'shakespeare_char'",
        ),
        ("study --recipe study_text --preset gpu", "unknown preset 'gpu'; did you mean 'cpu'"),
        ("study --preset cpu", "name that with --recipe or --config"),
        ("train --recipe", "--recipe takes a name; vit2dpe recipes lists them"),
        ("train --recip digits_quick", "unknown option --recip; did you mean --recipe?"),
    ],
)
def test_a_mistake_names_what_was_meant(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_package_copied_without_its_recipes(monkeypatch, capsys):
    monkeypatch.setattr("vit2dpe.cli.recipes.clone", lambda: None)
    assert main(["train", "--recipe", "digits_quick"]) == 2
    assert "this package was copied without them" in capsys.readouterr().err
