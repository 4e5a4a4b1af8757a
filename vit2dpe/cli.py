"""The command `vit2dpe`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A word of the command line: what it is for, and the function and the dataclass of settings behind it.

    Both are named "module:name" within the package, so that nothing is imported before the command is known. The
    function is called as `run(config, command="what was typed")`.
    """

    summary: str
    run: str
    config: str


COMMANDS = {
    "study": Command(
        "train a model with each positional encoding, change the resolution, see which survives",
        "train.study:study",
        "train.config:StudyConfig",
    ),
    "show": Command("draw encodings, without data", "cli:_show", ""),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: vit2dpe <command> [options]\n\ncommands:\n{lines}\n\n"
        "`vit2dpe <command> --help` tells the options of a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 what was asked cannot work (one line says why), 130 stopped by Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        from . import __version__

        print(f"vit2dpe {__version__}")
        return 0
    try:
        words = 2 if " ".join(args[:2]) in COMMANDS else 1  # "text train" is one command
        name, args = " ".join(args[:words]), args[words:]
        if name not in COMMANDS:
            from .errors import unknown

            raise unknown("command", name, COMMANDS)
        command = COMMANDS[name]
        return _run(name, command, args) if command.config else _named(command.run)(args)
    except ValueError as error:  # ConfigError, DataError, CheckpointError: the user's to mend
        if os.environ.get("VIT2DPE_DEBUG"):
            raise
        print(f"vit2dpe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvit2dpe: stopped; finished cells are kept, the same command goes on from there", file=sys.stderr)
        return 130


def _run(name: str, command: Command, args: list[str]) -> int:
    """Settings from the command line and `--config`, into the dataclass, into the function."""
    config = _named(command.config)
    switches = {f"--{f.name}" for f in fields(config) if f.type == "bool"}
    args = [f"{arg}=true" if arg in switches else arg for arg in args]
    parser = _parser(f"vit2dpe {name}", config.__doc__ or "")
    parser.add_class_arguments(config)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    values = _parse(parser, args)
    settings = config(**{k: v for k, v in values.items() if k != "config"})
    _named(command.run)(settings, command=shlex.join(["vit2dpe", *name.split(), *args]))
    return 0


def _named(place: str) -> Any:
    """The object that "module:name" means within the package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"vit2dpe.{module}"), name)


def _show(args: list[str]) -> int:
    parser = _parser("vit2dpe show", "Draw encodings, without data.")
    parser.add_argument("encodings", nargs="+", help="words such as rope, sincos+alibi, rope(base=10), or all")
    parser.add_argument("--grid", default="14x14", type=str, help="rows x columns, 14x14; a line: 64x1 is 64")
    parser.add_argument("--out", default="encodings.png", type=str, help="the picture to write")
    values = _parse(parser, args)
    from .show import save

    print(save(values["encodings"], _grid(values["grid"]), values["out"]))
    return 0


def _grid(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        from .errors import ConfigError

        raise ConfigError(f"a grid is written 14x14 (rows x columns) or 64 (a line), got {text!r}")
    return tuple(int(part) for part in parts)


def _parser(name: str, text: str):
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        from .errors import ConfigError

        raise ConfigError(f'{name} needs an extra that is not installed: pip install "vit2dpe[recipes]"') from None
    return ArgumentParser(prog=name, description=text.split("\n\n")[0], exit_on_error=False)


def _parse(parser, args: list[str]) -> dict:
    """The settings, or a ConfigError of one line. Options are spelled with hyphens or underscores alike."""
    from jsonargparse import ArgumentError

    from .errors import ConfigError

    args = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg) for arg in args]
    if "-h" in args or "--help" in args:
        print(re.sub(r"--\w+", lambda m: m[0].replace("_", "-"), parser.format_help()))
        raise SystemExit(0)
    try:
        return parser.parse_args(args).as_dict()
    except (ArgumentError, TypeError) as error:
        message = " ".join(str(error).split())
        known = [option for action in parser._actions for option in action.option_strings]
        strange = next((a.split("=")[0] for a in args if a.startswith("--") and a.split("=")[0] not in known), None)
        near = difflib.get_close_matches(strange, known, n=1) if strange else []
        hint = f"unknown option {strange}; did you mean {near[0]}? " if near else ""
        raise ConfigError(hint + message) from None


if __name__ == "__main__":
    sys.exit(main())
