"""The command line and YAML into dataclasses of settings; an error is one line and names the nearest setting.

A setting is a field and its line in the docstring's Args: from them come the option, its type, default and help.
Options are spelled with hyphens or underscores alike, a switch needs no value, and short names are those of
`spec.full_names`, on the command line and in YAML: `--epochs` is `--optim.epochs`, `--data x` is `--data.name x`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from argparse import SUPPRESS
from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from itertools import pairwise
from operator import or_
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError, unknown
from ..ranges import Range, numbers_of
from ..spec import Plain, Settings, flat, full_name, full_names, texts_of
from .recipes import find_recipe
from .yaml_files import Others, read_yaml, several_numbers

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

S = TypeVar("S", bound=Settings)
OTHERS = ("config", "recipe", "preset", "print_config", "help")  # options that are no settings


class Option(NamedTuple):
    """A setting as an option, under the title of its group in the help; `range`: of a number."""

    name: str
    hint: type | UnionType
    default: Plain
    help: str
    title: str
    positional: bool
    range: Range | None

    @property
    def nullable(self) -> bool:
        """Whether it may be null and takes no text."""
        return type(None) in get_args(self.hint) and str not in get_args(self.hint)

    @property
    def type(self) -> str:
        """The type in words, and the range: "int or null, at least 1"."""
        kinds = get_args(self.hint) if isinstance(self.hint, UnionType) else (self.hint,)
        names = [kind.__name__ if type(kind) is type else str(kind) for kind in kinds]
        return " or ".join(names).replace("NoneType", "null") + (f", {self.range}" if self.range else "")


def settings(
    name: str, config: type[S], args: list[str], others: Others = dict, imports: bool = False, examples: str = ""
) -> S:
    """The settings of command `name`, from `args` and from the YAML files that they name with --config.

    Args:
        others: gives the settings of other commands, by which a file of theirs is recognized.
        imports: whether the command takes --import, for its help.
        examples: lines that open its help.

    Raises:
        ConfigError: for what cannot be understood.
        SystemExit: after --help and --print_config.
    """
    options = list(options_of(config()))
    parser = _parser(f"vit2dpe {name}", inspect.getdoc(config) or "", options, imports)
    if "-h" in args or "--help" in args:
        positional = "".join(f"[{option.name} ...] " for option in options if option.positional)
        parser.usage = f"vit2dpe {name} {positional}[options]\n\n{examples}".rstrip().replace("%", "%%")
        text = re.sub(r"--[\w.]+", lambda option: option[0].replace("_", "-"), parser.format_help())
        # Not every version of jsonargparse takes the doubled sign as one, or names types by their names.
        print(re.sub(r"<class '(\w+)'>", r"\1", text.replace("%%", "%")))
        raise SystemExit(0)
    words = _with_preset(_with_recipe([word for arg in args for word in _full_option(arg, config)]))
    words, read = _with_files(words, config, others)
    words = [_value(last, word, options) for last, word in pairwise(["", *words])]
    given = _parse(parser, words, options)
    return config.of(read | {name: value for name, value in given.items() if value != [] or name not in read})


def options_of(config: Settings, prefix: str = "", title: str = "settings") -> Iterator[Option]:
    """Every setting as an option, by dotted names; those of nested settings under their own titles."""
    kind, defaults = type(config), flat(config)
    hints, texts, numbers, docs = get_type_hints(kind), texts_of(kind), numbers_of(kind), _documented(kind)
    for field in fields(config):
        value, name = getattr(config, field.name), field.name
        if isinstance(value, Settings):
            nested = (inspect.getdoc(type(value)) or name).partition("\n")[0]
            yield from options_of(value, f"{prefix}{name}.", nested.rstrip("."))
        else:
            hint = str | int | list | None if name in texts else _union(hints[name])
            range_, text = numbers[name].range if name in numbers else None, docs.get(name, "")
            text = f"{text.rstrip('.')}; {range_}." if range_ else text
            positional = "positional" in field.metadata
            yield Option(prefix + name, hint, defaults[name], text, title, positional, range_)


def _union(hint: type | UnionType) -> type | UnionType:
    """int | None of Optional[int], which is what Python makes of a type with a range."""
    return reduce(or_, get_args(hint)) if get_origin(hint) is Union else hint


def _parser(name: str, doc: str, options: list[Option], imports: bool = False) -> ArgumentParser:
    try:
        from jsonargparse import ArgumentParser
    except ImportError:  # of a package that runs from a folder, without what it requires
        raise ConfigError(f"{name} needs a package that is not installed: pip install jsonargparse") from None
    parser = ArgumentParser(prog=name, description=doc.split("\n\n")[0], exit_on_error=False, allow_abbrev=False)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(option.title for option in options)}
    for option in options:
        add, text = groups[option.title].add_argument, option.help.replace("%", "%%")
        if option.positional:
            add(option.name, nargs="*", default=[], help=text)
        elif bool in (option.hint, *get_args(option.hint)):
            add(f"--{option.name}", type=option.hint, default=option.default, nargs="?", const=True, help=text)
        else:
            add(f"--{option.name}", type=option.hint, default=option.default, help=text)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    more = {"recipe": "one that comes with the package, by name; `vit2dpe recipes` lists them"}
    more["preset"] = "a variant of it: with cpu, x.cpu.yaml is read after x.yaml"
    if imports:
        more["import"] = "a file (near.py) or module that adds encodings; or several"
    for other, text in more.items():  # no settings: --print_config leaves them out
        parser.add_argument(f"--{other}", default=SUPPRESS, help=text)
    return parser


def _value(last: str, word: str, options: list[Option]) -> str:
    """The word none as null, where it is the value of an option that may be null and is no text; 1,2 as [1,2]."""
    name, equals, value = word.partition("=")
    name, start, value = (name, f"{name}=", value) if equals else (last, "", word)
    able = [option for option in options if f"--{option.name}" == name and option.nullable]
    if able and "," in value and "[" not in value and several_numbers(able[0].hint):
        return f"{start}[{value}]"
    return f"{start}null" if able and value.lower() == "none" else word


def _parse(parser: ArgumentParser, args: list[str], options: list[Option]) -> dict[str, Plain]:
    """The settings that `args` name, by dotted names; a value of a wrong type is refused in one sentence."""
    from jsonargparse import ArgumentError

    try:
        values = parser.parse_args(args, defaults=any(arg.startswith("--print_config") for arg in args))
    except (ArgumentError, TypeError) as error:
        message = " ".join(str(error).split())
        match = re.fullmatch(r'Parser key "([\w.]+)":.*?(?:Given value|Got value): ?(.*)', message)
        for option in options:
            if match and match[1] == option.name:
                message = f"{option.name} must be of type {option.type}, got {match[2] or repr('')}"
        raise ConfigError(message) from None
    return {option.name: values[option.name] for option in options if option.name in values}


def _full_option(arg: str, config: type[Settings]) -> list[str]:
    """--epochs=3 as --optim.epochs=3, hyphens as underscores; --config=x, --recipe=x and --preset=x as two words."""
    option, equals, value = arg.partition("=")
    name = option.removeprefix("--").replace("-", "_")
    if not option.startswith("--"):
        return [arg]
    if name in ("config", "recipe", "preset") and equals:
        return [f"--{name}", value]
    if name not in OTHERS and not full_names(config, name):
        known = [*flat(config()), *OTHERS]
        near = difflib.get_close_matches(name, [*known, *(full.rpartition(".")[2] for full in known)], n=1)
        raise ConfigError(f"unknown option {option}" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
    return [f"--{name if name in OTHERS else full_name(config, name)}{equals}{value}"]


def _with_recipe(words: list[str]) -> list[str]:
    """`--recipe x` as --config and the file of that name."""
    if "--recipe" not in words:
        return words
    at = words.index("--recipe")
    if at + 1 == len(words):
        raise ConfigError("--recipe takes a name; vit2dpe recipes lists them")
    return _with_recipe([*words[:at], "--config", str(find_recipe(words[at + 1])), *words[at + 2 :]])


def _with_preset(words: list[str]) -> list[str]:
    """`--config x.yaml --preset cpu` as `--config x.yaml --config x.cpu.yaml`."""
    if "--preset" not in words:
        return words
    at = words.index("--preset")
    preset, words = " ".join(words[at + 1 : at + 2]), words[:at] + words[at + 2 :]
    if "--config" not in words[:-1]:
        raise ConfigError(f"--preset {preset} is a variant of a recipe: name that with --recipe or --config")
    at = words.index("--config") + 2
    recipe = Path(words[at - 1])
    others = recipe.parent.glob(f"{recipe.stem}.*{recipe.suffix}")
    variants = {path.stem.removeprefix(f"{recipe.stem}."): str(path) for path in others}
    if preset not in variants:
        raise unknown("preset", preset, sorted(variants) or ["(there is none)"])
    return [*words[:at], "--config", variants[preset], *words[at:]]


def _with_files(words: list[str], config: type[Settings], others: Others) -> tuple[list[str], dict[str, Plain]]:
    """What files hold, as JSON, in place of their names, which the parser takes; positional settings by themselves."""
    positional = [option.name for option in options_of(config()) if option.positional]
    read: dict[str, Plain] = {}
    for i, word in enumerate(words):
        if i and words[i - 1] == "--config":
            values = read_yaml(word, config, others)
            read |= {name: values.pop(name) for name in positional if name in values}
            words = [*words[:i], json.dumps(values, default=str), *words[i + 1 :]]
    return words, read


def _documented(config: type[Settings]) -> dict[str, str]:
    """Setting -> its text in the Args section of the class's docstring, or of that of a class it extends."""
    docs: dict[str, str] = {}
    for base in config.__bases__:
        if issubclass(base, Settings):
            docs |= _documented(base)
    name = ""
    for line in inspect.cleandoc(config.__doc__ or "").partition("Args:\n")[2].splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name, docs[match[1]] = match[1], match[2]
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs
