"""The command `vit2dpe`. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
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
    "train": Command(
        "train a classifier of images with any encoding: resumable, on one process or many",
        "train.train:train",
        "train.settings:TrainConfig",
    ),
    "text train": Command(
        "train a language model on plain text with any encoding",
        "train.text:train",
        "train.text_config:TextTrainConfig",
    ),
    "text sample": Command("let it write", "train.text:sample", "train.text_config:SampleConfig"),
    "pretrain": Command(
        "pretrain an encoder without labels, by hiding patches (MAE, SimMIM), with any encoding",
        "train.pretrain:pretrain",
        "train.pretrain_settings:PretrainConfig",
    ),
    "probe": Command(
        "what the frozen features of a run are worth: linear classifier, nearest neighbours",
        "train.probe:probe",
        "train.pretrain_settings:ProbeConfig",
    ),
    "evaluate": Command(
        "measure any timm model, or a trained one, at other sizes",
        "train.evaluate:evaluate_model",
        "train.config:EvaluateConfig",
    ),
    "show": Command("draw encodings, without data, or a model's attention to an image or a sentence", "cli:_show", ""),
    "report": Command("one HTML page of one study or several", "cli:_report", ""),
    "bench": Command("time our models against timm's, and against no encoding", "bench:bench", "bench:BenchConfig"),
    "doctor": Command("say whether this machine is fit to train on", "doctor:doctor", "doctor:DoctorConfig"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: vit2dpe <command> [options]\n\ncommands:\n{lines}\n\n"
        "`vit2dpe <command> --help` tells the options of a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 what was asked cannot work, 1 it failed on the way, 130 and 143 stopped by a signal.

    One line says why; VIT2DPE_DEBUG=1 shows where.
    """
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
        _complain(error)
        return 2
    except (RuntimeError, OSError) as error:  # TrainingError, a full disk, a lost process
        if os.environ.get("VIT2DPE_DEBUG") or not _expected(error):
            raise
        _complain(error)
        return 1
    except KeyboardInterrupt:
        print("\nvit2dpe: stopped; finished cells are kept, the same command goes on from there", file=sys.stderr)
        return 130


def _run(name: str, command: Command, args: list[str]) -> int:
    """Settings from the command line and `--config`, into the dataclass, into the function."""
    config = _named(command.config)
    switches = {f"--{option}" for option, value in _options(config) if isinstance(value, bool)}
    typed = shlex.join(["vit2dpe", *name.split(), *args])
    args = [_in_full(arg, [option for option, _ in _options(config)]) for arg in args]
    args = _with_preset([f"{arg}=true" if _underscored(arg) in switches else arg for arg in args])
    parser = _parser(f"vit2dpe {name}", config.__doc__ or "")
    parser.add_class_arguments(config)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_argument("--preset", help="a variant of it: with cpu, x.cpu.yaml is read after x.yaml")
    _describe(parser, config)
    values = _parse(parser, args)
    _named(command.run)(_filled(config, values), command=typed)
    return 0


def _with_preset(args: list[str]) -> list[str]:
    """`--config x.yaml --preset cpu` as `--config x.yaml --config x.cpu.yaml`."""
    from .errors import ConfigError, unknown

    args = [
        part for arg in args for part in (arg.split("=", 1) if arg.startswith(("--config=", "--preset=")) else [arg])
    ]
    if "--preset" not in args:
        return args
    where = args.index("--preset")
    name, args = " ".join(args[where + 1 : where + 2]), args[:where] + args[where + 2 :]
    if "--config" not in args[:-1]:
        raise ConfigError(f"--preset {name} is a variant of a recipe: name that with --config")
    at = args.index("--config") + 1
    recipe = Path(args[at])
    variant = recipe.with_name(f"{recipe.stem}.{name}{recipe.suffix}")
    if not variant.is_file():
        others = [p.stem.removeprefix(f"{recipe.stem}.") for p in recipe.parent.glob(f"{recipe.stem}.*{recipe.suffix}")]
        raise unknown("preset", name, sorted(others) or ["(there is none)"])
    return [*args[: at + 1], "--config", str(variant), *args[at + 1 :]]


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every setting of a dataclass, those of nested ones too."""
    for setting in fields(config):
        if is_dataclass(setting.default):
            yield from _options(setting.default, f"{prefix}{setting.name}.")
        else:
            yield prefix + setting.name, setting.default


def _describe(parser: Any, config: Any) -> None:
    """What the docstrings say of each setting, as the help of its option; a class's first line titles its group."""
    said = _documented(config)
    for setting in fields(config):
        if is_dataclass(setting.default):
            nested = type(setting.default)
            said |= {f"{setting.name}.{name}": text for name, text in _documented(nested).items()}
            for group in parser._action_groups:
                if nested.__name__ in (group.title or ""):
                    group.title = (nested.__doc__ or "").partition("\n")[0].rstrip(".")
    for action in parser._actions:
        if action.dest in said:
            action.help = said[action.dest].replace("%", "%%")


def _documented(config: Any) -> dict[str, str]:
    """Setting -> its text in the Args section of the class's docstring."""
    lines = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if match := re.match(r"    (\w+): (.*)", line):
            name, text = match.groups()
            found[name] = text
        elif found and line.strip():
            found[name] += " " + line.strip()
    return found


def _filled(config: Any, values: dict[str, Any]) -> Any:
    """The dataclass, and those nested in it, with these values."""
    nested = {f.name: type(f.default) for f in fields(config) if is_dataclass(f.default)}
    names = {f.name for f in fields(config)}
    given = {k: _filled(nested[k], v) if k in nested else v for k, v in values.items() if k in names}
    return config(**given)


def _complain(error: BaseException) -> None:
    line = " ".join(str(error).split())
    print(f"vit2dpe: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _expected(error: BaseException) -> bool:
    from .errors import TrainingError

    return isinstance(error, TrainingError | OSError)


def _named(place: str) -> Any:
    """The object that "module:name" means within the package."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"vit2dpe.{module}"), name)


def _show(args: list[str]) -> int:
    parser = _parser("vit2dpe show", "Draw encodings, without data, or a model's attention.")
    parser.add_argument("encodings", nargs="*", help="words such as rope, sincos+alibi, rope(base=10), or all")
    parser.add_argument("--grid", default="14x14", type=str, help="rows x columns, 14x14; a line: 64x1 is 64")
    parser.add_argument("--out", default=None, type=str, help="the picture to write: encodings.png, attention.png")
    parser.add_argument("--attention", action="store_true", help="draw attention, with --image or --text")
    parser.add_argument("--image", default=None, type=str, help="an image file, for --run or --model")
    parser.add_argument("--text", default=None, type=str, help="a sentence, for a --run of text")
    parser.add_argument("--run", default=None, type=str, help="the folder of a finished run")
    parser.add_argument("--model", default=None, type=str, help="a timm name; vit2dpe_* has its initial weights")
    parser.add_argument("--size", default=None, type=str, help="of the image for the model: 48 or 48x64")
    values = _parse(parser, args)
    if values["attention"]:
        from .show_attention import command

        print(command(values))
        return 0
    from .show import save

    print(save(values["encodings"], _grid(values["grid"]), values["out"] or "encodings.png"))
    return 0


def _report(args: list[str]) -> int:
    parser = _parser("vit2dpe report", "One HTML page, without a network, of one study or several.")
    parser.add_argument("runs", nargs="+", help="folders of studies, each with its results.csv")
    parser.add_argument("--out", default="report.html", type=str, help="the page to write")
    values = _parse(parser, args)
    from .train.html import merge

    print(merge(values["runs"], values["out"]))
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

    args = [_underscored(arg) for arg in args]
    if "-h" in args or "--help" in args:
        print(re.sub(r"--[\w.]+", lambda m: m[0].replace("_", "-"), parser.format_help()))
        raise SystemExit(0)
    known = [option for action in parser._actions for option in action.option_strings]
    for before, arg in zip(["", *args], args, strict=False):
        if before == "--config" or arg.startswith("--config="):
            _check_yaml(arg.removeprefix("--config="), {option.removeprefix("--") for option in known})
    try:
        return parser.parse_args(args).as_dict()
    except (ArgumentError, TypeError) as error:
        message = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split()))
        strange = next((a.split("=")[0] for a in args if a.startswith("--") and a.split("=")[0] not in known), None)
        near = difflib.get_close_matches(strange, known, n=1) if strange else []
        hint = f"unknown option {strange}; did you mean {near[0]}? " if near else ""
        raise ConfigError(hint + message) from None


def _underscored(arg: str) -> str:
    return re.sub(r"^--[\w.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), arg)


def _in_full(arg: str, options: list[str]) -> str:
    """--epochs as --optim.epochs and --data as --data.name, where exactly one setting is meant."""
    word, equals, value = arg.partition("=")
    short = _underscored(word).removeprefix("--")
    if not arg.startswith("--") or short in options:
        return arg
    fits = [o for o in options if o.endswith(f".{short}")] or [o for o in options if o == f"{short}.name"]
    return f"--{fits[0]}{equals}{value}" if len(fits) == 1 else arg


def _check_yaml(path: str, known: set[str]) -> None:
    """Refuse what YAML would take silently, a key given twice and a number that is none; and name the nearest key."""
    import yaml

    from .errors import ConfigError, unknown

    if not os.path.isfile(path):
        raise ConfigError(f"there is no file {path}")

    def walk(node: Any, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            if isinstance(node, yaml.ScalarNode) and node.value.lower().lstrip("+-") in (".nan", ".inf", "nan", "inf"):
                raise ConfigError(f"{path}: {prefix} must be a finite number, got {node.value}")
            return
        seen: set[str] = set()
        for key_node, value in node.value:
            key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            if key in seen:
                raise ConfigError(f"{path}: {key} is given twice, again in line {key_node.start_mark.line + 1}")
            seen.add(key)
            inside = any(option.startswith(f"{key}.") for option in known)
            if key not in known and not inside:
                raise unknown(f"setting in {path}", key, sorted(known - {"config", "print_config", "help"}))
            if inside or not isinstance(value, yaml.MappingNode):
                walk(value, key)

    try:
        with open(path, encoding="utf-8") as file:
            walk(yaml.compose(file, Loader=yaml.SafeLoader), "")
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
