"""The command line and YAML into dataclasses of settings; a refusal is one line and names the nearest setting.

A setting is a field and its line in the docstring's Args: from them come the option, its type, default and help.
Options are spelled with hyphens or underscores alike, a switch needs no value, and short names are those of
`spec.full_names`, on the command line and in YAML: `--epochs` is `--optim.epochs`, `--data x` is `--data.name x`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, NamedTuple, TypeVar, get_args, get_type_hints

from ..errors import ConfigError, unknown
from ..spec import Plain, Settings, flat, full_name, full_names, texts_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

S = TypeVar("S", bound=Settings)


class Option(NamedTuple):
    """A setting as an option: `hint` is its type, `group` what the help files it under."""

    hint: type | UnionType
    default: Plain
    help: str
    group: str
    positional: bool


def settings(name: str, config: type[S], args: list[str]) -> S:
    """The settings of command `name`, from `args` and from the YAML files that they name with --config.

    Raises:
        ConfigError: for what cannot be understood.
        SystemExit: after --help and --print_config.
    """
    options = dict(options_of(config()))
    parser = _parser(f"vit2dpe {name}", config, options)
    if "-h" in args or "--help" in args:
        text = re.sub(r"--[\w.]+", lambda found: found[0].replace("_", "-"), parser.format_help())
        # Not every version of jsonargparse takes the doubled sign as one, or names types by their names.
        print(re.sub(r"<class '(\w+)'>", r"\1", text.replace("%%", "%")))
        raise SystemExit(0)
    args = [_full_option(arg, config) for arg in args]
    return config.of(_parsed(parser, list(_with_files(args, config)), options))


def options_of(config: Settings, prefix: str = "", title: str = "settings") -> Iterator[tuple[str, Option]]:
    """(dotted name, option) of every setting, those of nested settings too."""
    hints, texts, said, defaults = (
        get_type_hints(type(config)),
        texts_of(type(config)),
        _documented(type(config)),
        flat(config),
    )
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Settings):
            nested = inspect.getdoc(type(value)) or field.name
            yield from options_of(value, f"{prefix}{field.name}.", nested.partition("\n")[0].rstrip("."))
        else:
            hint = str | int | list | None if field.name in texts else hints[field.name]
            positional = "positional" in field.metadata
            yield prefix + field.name, Option(hint, defaults[field.name], said.get(field.name, ""), title, positional)


def _parser(name: str, config: type[Settings], options: Mapping[str, Option]) -> ArgumentParser:
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        raise ConfigError(f'{name} needs an extra that is not installed: pip install "vit2dpe[recipes]"') from None
    summary = (inspect.getdoc(config) or "").partition("\n\n")[0]
    parser = ArgumentParser(prog=name, description=summary, exit_on_error=False, allow_abbrev=False)
    groups = {group: parser.add_argument_group(group) for group in dict.fromkeys(o.group for o in options.values())}
    for option, (hint, default, text, group, positional) in options.items():
        text = text.replace("%", "%%")
        if positional:
            groups[group].add_argument(option, nargs="*", default=[], help=text)
        elif bool in (hint, *get_args(hint)):
            groups[group].add_argument(f"--{option}", type=hint, default=default, nargs="?", const=True, help=text)
        else:
            groups[group].add_argument(f"--{option}", type=hint, default=default, help=text)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_argument("--preset", help="a variant of it: with cpu, x.cpu.yaml is read after x.yaml")
    return parser


def _parsed(parser: ArgumentParser, args: list[str], options: Mapping[str, Option]) -> dict[str, Plain]:
    """The settings that were given, by dotted names; a value of a wrong type is refused in one sentence."""
    from jsonargparse import ArgumentError

    try:
        given = parser.parse_args(args, defaults=any(arg.startswith("--print_config") for arg in args))
    except (ArgumentError, TypeError) as error:
        message = " ".join(str(error).split())
        found = re.fullmatch(r'Parser key "([\w.]+)":.*?(?:Given value|Got value): (.*)', message)
        if found and found[1] in options:
            hint = options[found[1]].hint
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            names = " or ".join(kind.__name__ if type(kind) is type else str(kind) for kind in kinds)
            message = f"{found[1]} must be of type {names.replace('NoneType', 'null')}, got {found[2]}"
        raise ConfigError(message) from None
    return {name: given[name] for name in options if name in given}


def _full_option(arg: str, config: type[Settings]) -> str:
    """--epochs=3 as --optim.epochs=3, hyphens as underscores."""
    word, equals, value = arg.partition("=")
    if not word.startswith("--"):
        return arg
    name = word.removeprefix("--").replace("-", "_")
    known = [*flat(config()), "config", "preset", "print_config"]
    fits = [name] if name in known else full_names(config, name)
    if not fits:
        near = difflib.get_close_matches(name, [*known, *(full.rpartition(".")[2] for full in known)], n=1)
        raise ConfigError(f"unknown option {word}" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
    return f"--{full_name(config, name) if name not in known else name}{equals}{value}"


def _with_files(args: list[str], config: type[Settings]) -> Iterator[str]:
    """The arguments with the content of files, as JSON, in place of their names; with `--preset cpu` that of x.cpu.yaml
    after that of x.yaml."""
    words = [word for arg in args for word in (arg.split("=", 1) if re.match("--(config|preset)=", arg) else [arg])]
    preset = ""
    if "--preset" in words:
        at = words.index("--preset")
        preset = " ".join(words[at + 1 : at + 2])
        del words[at : at + 2]
        if "--config" not in words[:-1]:
            raise ConfigError(f"--preset {preset} is a variant of a recipe: name that with --config")
    for before, word in zip(["", *words], words, strict=False):
        yield read_yaml(word, config) if before == "--config" else word
        if before == "--config" and preset:
            recipe = Path(word)
            others = recipe.parent.glob(f"{recipe.stem}.*{recipe.suffix}")
            variants = {path.stem.removeprefix(f"{recipe.stem}."): path for path in others}
            if preset not in variants:
                raise unknown("preset", preset, sorted(variants) or ["(there is none)"])
            yield from ("--config", read_yaml(str(variants[preset]), config))
            preset = ""


def read_yaml(path: str, config: type[Settings]) -> str:
    """The settings of a file as JSON, nested and by their full names; what YAML would take silently is refused.

    Raises:
        ConfigError: for a file that is not there or no YAML, a key given twice, a number that is not finite, and a
            setting that does not exist, with the nearest one.
    """
    import yaml

    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}")
    known, tree, seen = list(flat(config())), dict[str, Plain](), set[str]()
    loader = yaml.SafeLoader("")

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            group = isinstance(value, yaml.MappingNode) and any(option.startswith(f"{name}.") for option in known)
            full = [name] if group else full_names(config, name)
            if len(full) != 1:
                raise unknown(f"setting in {path}", name, sorted(known))
            if full[0] in seen:
                raise ConfigError(f"{path}: {name} is given twice, again in line {key.start_mark.line + 1}")
            seen.add(full[0])
            if group:
                walk(value, f"{name}.")
                continue
            if isinstance(value, yaml.ScalarNode) and re.fullmatch(r"[+-]?\.?(nan|inf)", value.value.lower()):
                raise ConfigError(f"{path}: {name} must be a finite number, got {value.value}")
            _put(tree, full[0], loader.construct_object(value, deep=True))

    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode):
            walk(root, "")
        elif root is not None:
            raise ConfigError(f"{path} holds no settings: write name: value")
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from None
    return json.dumps(tree, default=str)


def _put(tree: dict[str, Plain], name: str, value: Plain) -> None:
    """tree["optim"]["lr"] of "optim.lr"."""
    head, dot, rest = name.partition(".")
    if not dot:
        tree[head] = value
        return
    inner = tree.setdefault(head, {})
    if isinstance(inner, dict):
        _put(inner, rest, value)


def _documented(config: type[Settings]) -> dict[str, str]:
    """Setting -> its text in the Args section of the class's docstring, or of that of a class it extends."""
    found: dict[str, str] = {}
    for base in config.__bases__:
        if issubclass(base, Settings):
            found |= _documented(base)
    name = ""
    for line in inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found
