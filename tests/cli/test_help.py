"""`--help`: questions with commands that work, an example first, and nothing heavy behind it."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.helpers import loaded_modules
from vit2dpe.cli import commands as cli
from vit2dpe.cli.help import QUESTIONS, examples, usage

LINES = [line for lines in QUESTIONS.values() for line in lines]


def help_of(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--help"])
    return capsys.readouterr().out


def test_every_command_stands_under_a_question(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    without = [name for name in cli.COMMANDS if f"  vit2dpe {name}" not in text]
    assert without == []
    for question in ("I have photos", "I have a checkpoint", "Which encoding", "I have text"):
        assert f"\n\n{question}" in text
    assert max(map(len, text.splitlines())) <= 110


def test_a_command_without_an_example_is_one_of_the_tools():
    assert usage({"study": "s", "mend": "put it right"}).partition("\nTools\n")[2].count("vit2dpe mend ") == 1
    assert "vit2dpe mend" not in usage({"mend": "put it right"}, "text ")


def test_a_family_lists_its_own(capsys):
    assert cli.main(["text", "--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  vit2dpe (\w+ \w+)", text, flags=re.M) == ["text train", "text sample"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_example_opens_the_help_of_a_command(command, capsys):
    text = help_of(command.split(), capsys)
    top = text.partition("\noptions:")[0]
    assert re.match(rf"usage: vit2dpe {command} .*\[options\]\n", top)
    assert f"\n  vit2dpe {command}" in top, "add a line to QUESTIONS in vit2dpe/cli/help.py"
    if command == "train":
        assert "vit2dpe text train" not in top


def test_what_a_line_gives_or_else_the_summary():
    assert examples("bench", "time it").split(maxsplit=2) == ["vit2dpe", "bench", "time it"]


@pytest.mark.parametrize("line", LINES)
def test_the_lines_are_understood(line, monkeypatch):
    """Up to the point where work would begin."""
    real, seen = cli._named, []

    def named(where):
        found = real(where)
        return found if isinstance(found, type) else lambda *args, **_: seen.append(args)

    monkeypatch.setattr(cli, "_named", named)
    monkeypatch.setattr("vit2dpe.encodings.own.import_encodings", lambda source: [])  # near.py is the reader's
    assert cli.main(shlex.split(line)) == 0
    assert len(seen) == 1


def test_help_imports_nothing_heavy():
    commands = ["", "text", *(name for name in cli.COMMANDS if name != "bench")]  # whose settings lie in a clone
    code = f"""
from vit2dpe.cli import main
for name in {commands}:
    try:
        main([*name.split(), "--help"])
    except SystemExit:
        print("helped")
"""
    heavy = ["torch", "timm", "torchvision", "numpy", "matplotlib", "sklearn", "PIL"]
    words = loaded_modules(code, heavy)
    assert words.count("helped") == len(commands) - 2
    assert words[-1] == "helped", words[-len(heavy) :]
