"""The command `vit2dpe`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields

USAGE = """usage: vit2dpe <command> [options]

commands:
  study   train a ViT with each positional encoding, change the resolution, see which survives
  show    draw encodings, without data

`vit2dpe <command> --help` tells the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 what was asked cannot work (one line says why), 130 stopped by Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {"study": _study, "show": _show}
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] == "--version":
        from . import __version__

        print(f"vit2dpe {__version__}")
        return 0
    try:
        if args[0] not in commands:
            from .errors import unknown

            raise unknown("command", args[0], commands)
        return commands[args[0]](args[1:])
    except ValueError as error:  # ConfigError, DataError, CheckpointError: the user's to mend
        if os.environ.get("VIT2DPE_DEBUG"):
            raise
        print(f"vit2dpe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvit2dpe: stopped; finished cells are kept, the same command goes on from there", file=sys.stderr)
        return 130


def _study(args: list[str]) -> int:
    from .train.config import StudyConfig

    switches = {f"--{f.name}" for f in fields(StudyConfig) if f.type == "bool"}
    args = [f"{arg}=true" if arg in switches else arg for arg in args]
    parser = _parser("vit2dpe study", StudyConfig.__doc__ or "")
    parser.add_class_arguments(StudyConfig)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    values = _parse(parser, args)
    config = StudyConfig(**{k: v for k, v in values.items() if k != "config"})
    from .train.study import study

    study(config, command=shlex.join(["vit2dpe", "study", *args]))
    return 0


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
