"""Settings from the command line and from YAML into dataclasses; a refusal is one line and names the nearest key."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def settings(name: str, config: Any, args: list[str]) -> Any:
    """The dataclass `config`, filled from `args` and from the files that they name with --config.

    Options are spelled with hyphens or underscores alike, a switch needs no value, and `--epochs` means
    `--optim.epochs` where no other setting ends so.

    Raises:
        ConfigError: for what cannot be understood.
    """
    switches = {f"--{option}" for option, value in _options(config) if isinstance(value, bool)}
    args = [_in_full(arg, [option for option, _ in _options(config)]) for arg in args]
    args = _with_preset(list(_switched(args, switches)))
    made = parser(f"vit2dpe {name}", config.__doc__ or "")
    made.add_class_arguments(config)
    made.add_argument("--config", action="config", help="YAML file with any of these settings")
    made.add_argument("--preset", help="a variant of it: with cpu, x.cpu.yaml is read after x.yaml")
    _describe(made, config)
    return _filled(config, parse(made, args))


def parser(name: str, text: str):
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        from ..errors import ConfigError

        raise ConfigError(f'{name} needs an extra that is not installed: pip install "vit2dpe[recipes]"') from None
    return ArgumentParser(prog=name, description=text.split("\n\n")[0], exit_on_error=False)


def parse(parser, args: list[str]) -> dict:
    """The settings, or a ConfigError of one line. Options are spelled with hyphens or underscores alike."""
    from jsonargparse import ArgumentError

    from ..errors import ConfigError

    args = [_underscored(arg) for arg in args]
    if "-h" in args or "--help" in args:
        text = re.sub(r"--[\w.]+", lambda m: m[0].replace("_", "-"), parser.format_help())
        # Not every version of jsonargparse takes the doubled sign as one, or names types by their names.
        print(re.sub(r"<class '(\w+)'>", r"\1", text.replace("%%", "%")))
        raise SystemExit(0)
    known = [option for action in parser._actions for option in action.option_strings]
    for before, arg in zip(["", *args], args, strict=False):
        if before == "--config" or arg.startswith("--config="):
            _check_yaml(arg.removeprefix("--config="), {option.removeprefix("--") for option in known})
    try:
        return parser.parse_args(args).as_dict()
    except (ArgumentError, TypeError) as error:
        message = _plainly(re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split())))
        given = [arg.split("=")[0] for arg in args if arg.startswith("--")]
        strange = next((arg for arg in given if not any(option.startswith(arg) for option in known)), None)
        near = difflib.get_close_matches(strange, known, n=1) if strange else []
        if near:  # then what the parser says is of what it took it for
            message = f"unknown option {strange}; did you mean {near[0]}?"
        raise ConfigError(message) from None


def _plainly(message: str) -> str:
    """What the parser says of a value of a wrong type, in one sentence; anything else as it is."""
    kinds = r"(?:.*Subtypes: \[(?P<kind>.*), NoneType\].*Given value|Expected an? (?P<only>\w+)\. Got value)"
    found = re.fullmatch(rf'Parser key "(?P<key>[\w.]+)": {kinds}: (?P<value>.*)', message)
    if found is None:
        return message
    wanted = f"{found['kind']} or null" if found["kind"] else found["only"]
    return f"{found['key']} must be of type {wanted}, got {found['value']}"


def _with_preset(args: list[str]) -> list[str]:
    """`--config x.yaml --preset cpu` as `--config x.yaml --config x.cpu.yaml`."""
    from ..errors import ConfigError, unknown

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


def _switched(args: list[str], switches: set[str]) -> Iterator[str]:
    """`--smoke` as `--smoke=true`, and `--smoke false` as `--smoke=false`."""
    rest = iter([*args, ""])
    arg = next(rest)
    for following in rest:
        if _underscored(arg) in switches:
            said = following.lower() in ("true", "false")
            yield f"{arg}={following.lower() if said else 'true'}"
            arg = next(rest) if said else following
        else:
            yield arg
            arg = following


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
    for group in parser._action_groups:
        if config.__name__ in (group.title or ""):
            group.title = "settings"
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
    """Setting -> its text in the Args section of the class's docstring, or of that of a class it extends."""
    lines = inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].splitlines()
    found: dict[str, str] = {}
    for base in config.__bases__:
        if is_dataclass(base):
            found |= _documented(base)
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

    from ..errors import ConfigError, unknown

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
