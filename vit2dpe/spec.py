"""What users type: specs of encodings and policies, sizes, lists; and the base of all settings, which parses them."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from types import NoneType, UnionType
from typing import ClassVar, NamedTuple, Self, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from .errors import ConfigError, SettingError, unknown
from .ranges import numbers_of

Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"  # what YAML holds
Size = tuple[int, int]  # (height, width), rows before columns
Sizes = tuple[Size, ...]
Words = tuple[str, ...]
Numbers = tuple[int, ...]
T = TypeVar("T")
Item: TypeAlias = "str | int | Sequence[int] | None"  # of a list


class Blocks(Numbers):
    """Numbers of blocks: from 0, or from the end from -1."""


class Term(NamedTuple):
    """A name with options, such as `rope(base=10)`."""

    name: str
    options: dict[str, Plain]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={_show_option(value)}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def check_option(kind: Callable[..., object], name: str, value: Plain) -> None:
    """Refuse a value that is not of the type the constructor names: rope(base=ten), relative(shared=maybe)."""
    parameters = inspect.signature(kind, eval_str=True).parameters
    wanted = parameters[name].annotation if name in parameters else inspect.Parameter.empty
    allowed = tuple(get_origin(option) or option for option in get_args(wanted) or (wanted,))
    fits = inspect.Parameter.empty in allowed or type(value) in allowed or (float in allowed and type(value) is int)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        names = ["a finite number" if option is float else option.__name__ for option in allowed]
        kinds = " or ".join(name for name in names if name != "NoneType")
        raise ConfigError(f"option {name} of {kind.__name__} must be {kinds}, got {value!r}")
    if isinstance(value, int) and abs(value) > (bound := 2**31 - 1 if float not in allowed else 2**63 - 1):
        raise ConfigError(f"option {name} of {kind.__name__} must lie within {bound} of 0, got {value}")


def parse_terms(text: str, kind: str, known: Iterable[str]) -> list[Term]:
    """The terms of a sum such as "sincos+rope(base=10)".

    Args:
        kind: what the names are names of, for the error.
        known: the names that are allowed.

    Raises:
        ConfigError: if it cannot be read, or a name is not among `known`.
    """
    known, terms = list(known), read_terms(text)
    for name, _ in terms:
        if name not in known:
            raise unknown(kind, name, known)
    return terms


def read_terms(text: str) -> list[Term]:
    """The terms of a sum, whatever their names are.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _unreadable(text) from None
    return [_term(node, text) for node in _summands(tree)]


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _term(node: ast.expr, text: str) -> Term:
    options: dict[str, Plain] = {}
    if isinstance(node, ast.Call) and not node.args and all(k.arg for k in node.keywords):
        options = {str(k.arg): _option(k.value, text) for k in node.keywords}
        node = node.func
    if not isinstance(node, ast.Name):
        raise _unreadable(text)
    return Term(node.id, options)


def _option(node: ast.expr, text: str) -> Plain:
    """A number, a quoted string, a tuple, true or false, or a bare word."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _unreadable(text) from None


def _show_option(value: Plain) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def _unreadable(text: str) -> ConfigError:
    return ConfigError(
        f"cannot read {text!r}: write names joined by '+', options in parentheses, as in 'sincos+rope(base=10)'"
    )


def parse_size(value: Item) -> Size:
    """(height, width) of "32", "32x48", 32 or (32, 48)."""
    sides = [str(side) for side in value] if isinstance(value, tuple | list) else str(value).lower().split("x")
    if len(sides) not in (1, 2) or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise ConfigError(f"a size is written 32 or 32x48 (height x width, pixels), got {value!r}")
    return int(sides[0]), int(sides[-1])


def parse_sizes(value: str | int | Sequence[Item]) -> Sizes:
    """Sizes, of text such as "24,32x48", a list or a single one."""
    return tuple(parse_size(item) for item in _items(value))


def show_size(size: Size) -> str:
    """32 or 32x48: what `parse_size` reads."""
    return f"{size[0]}x{size[1]}" if size[0] != size[1] else str(size[0])


def split_words(text: str) -> list[str]:
    """Comma-separated words; commas inside parentheses stay: "rope(base=10),yarn(beta_fast=2, beta_slow=1)"."""
    return [word for word in _split(text, ",") if word]


def split_blocks(spec: str) -> list[str]:
    """The words that the blocks of a model follow in turn: "rope/rope(base=10)/none"; a specification without "/" is
    one."""
    return _split(spec, "/")


def join_blocks(words: T) -> T | str:
    """One specification of a list of words; anything else as it is."""
    listed = words if isinstance(words, list | tuple) else ()
    texts = [word for word in listed if isinstance(word, str)]
    return "/".join(texts) if texts and len(texts) == len(listed) else words


def _split(text: str, mark: str) -> list[str]:
    words, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == mark and depth == 0:
            words.append(text[start:i])
            start = i + 1
    return [word.strip() for word in [*words, text[start:]]]


def _items(value: str | int | Sequence[Item] | None) -> list[Item]:
    """The items of a comma-separated list, of a list, or of a single number."""
    return (
        list(split_words(value)) if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    )


def parse_words(value: str | Sequence[str] | None) -> Words:
    """Words, of text or a list; null, as YAML has it, is the word none."""
    return tuple("none" if item is None else str(item) for item in _items(value))


def parse_numbers(value: str | int | Sequence[int]) -> Numbers:
    """Whole numbers above 0: of "1,2,4", 4 or (1, 2, 4)."""
    items = [str(item) for item in _items(value)]
    if not items or not all(item.isdecimal() and int(item) > 0 for item in items):
        raise ConfigError(f"whole numbers above 0 are written 1,2,4, got {value!r}")
    return tuple(int(item) for item in items)


def parse_block_numbers(value: str | int | Sequence[int]) -> Blocks:
    """Numbers of blocks: of "0,5,-1", 4 or (0, 5, -1)."""
    items = [str(item) for item in _items(value)]
    if not items or not all(item.removeprefix("-").isdecimal() for item in items):
        raise ConfigError(f"numbers of blocks are written 2,5,8 or 0,-1, got {value!r}")
    return Blocks(int(item) for item in items)


def parse_term(value: str | Term | None) -> Term:
    """The one term of a text; null, as YAML has it, is the word none."""
    terms = [value] if isinstance(value, Term) else read_terms("none" if value is None else str(value))
    if len(terms) != 1:
        raise ConfigError(f"one name with its options is needed, got {value!r}")
    return terms[0]


class _Text(NamedTuple):
    """How a type of settings is read from text, and written."""

    parse: Callable[..., object]
    show: Callable[..., str]
    optional: bool = False


_TEXTS: Mapping[object, _Text] = {
    Size: _Text(parse_size, show_size),
    Sizes: _Text(parse_sizes, lambda sizes: ",".join(map(show_size, sizes))),
    Words: _Text(parse_words, ",".join),
    Numbers: _Text(parse_numbers, lambda numbers: ",".join(map(str, numbers))),
    Blocks: _Text(parse_block_numbers, lambda numbers: ",".join(map(str, numbers))),
    Term: _Text(parse_term, str),
}


@dataclass(frozen=True)
class Settings:
    """Base of the dataclasses of settings.

    A field whose type is `Size`, `Sizes`, `Words`, `Numbers`, `Blocks` or `Term`, or it or None, takes text as well:
    `size="32x48"` becomes (32, 48) when an instance is made. A number has its range in its type (`vit2dpe/ranges.py`),
    and one outside is refused then. Settings may be nested; every field has a default.

    `SHORT` maps further names to dotted ones, for `of`, the command line and YAML: {"train_size": "data.size"}.
    """

    SHORT: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, text in texts_of(type(self)).items():
            value = getattr(self, name)
            if text.optional and text.parse is not parse_words and value in ("none", "None"):
                object.__setattr__(self, name, None)
            elif value is not None or not text.optional:
                try:
                    object.__setattr__(self, name, text.parse(value))
                except ConfigError as error:
                    raise SettingError(name, f": {error}") from None
        for name, number in numbers_of(type(self)).items():
            number.check(name, getattr(self, name))
        for name, kinds in _kinds_of(type(self)).items():
            if not isinstance(value := getattr(self, name), kinds):
                named = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
                of = f"; {type(self).__name__}.of({name}={{...}}) takes a dict" if isinstance(value, dict) else ""
                raise SettingError(name, f" must be of type {named.replace(' or PathLike', '')}, got {value!r}{of}")

    @classmethod
    def preset(cls, given: Mapping[str, Plain]) -> Mapping[str, Plain]:
        """Defaults that depend on the given settings, both by dotted names; by default none."""
        return {}

    @classmethod
    def of(cls, given: Mapping[str, Plain] | None = None, **settings: Plain) -> Self:
        """Settings by any of their names: `of(epochs=3, data="digits", width=64)`; those not given are the preset's.

        A group may be given as YAML nests it: `of(optim={"epochs": 3})`.
        """
        named = {full_name(cls, name): value for name, value in _by_name(cls, {**(given or {}), **settings}).items()}
        return changed(cls(), {**cls.preset(named), **named})


S = TypeVar("S", bound=Settings)


def _by_name(config: type[Settings], given: Mapping[str, Plain]) -> dict[str, Plain]:
    """Settings by dotted names, of groups that are nested."""
    groups = {name for name, kinds in _kinds_of(config).items() if issubclass(kinds[0], Settings)}
    values: dict[str, Plain] = {}
    for name, value in given.items():
        inner = value if isinstance(value, Mapping) and name in groups else None
        values |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return values


def _kinds_of(config: type) -> dict[str, tuple[type, ...]]:
    """Field -> the types it may have, of those that are a word, a path, a switch, a dict or a group of settings."""
    found: dict[str, tuple[type, ...]] = {}
    for name, hint in get_type_hints(config).items():
        kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
        if all(isinstance(kind, type) and issubclass(kind, str | bool | dict | Settings | NoneType) for kind in kinds):
            found[name] = (*kinds, PathLike) if str in kinds else tuple(kinds)
    return found


def texts_of(config: type) -> dict[str, _Text]:
    """Field -> how it is read from text and written, of the fields that can be given as text."""
    texts = {}
    for name, hint in get_type_hints(config).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if kind in _TEXTS]
        if kinds:
            texts[name] = _TEXTS[kinds[0]]._replace(optional=type(None) in get_args(hint))
    return texts


def plain(config: Settings) -> dict[str, Plain]:
    """Settings as YAML and JSON hold them, nested as they are: sizes and lists as text, tuples as lists."""
    texts, values = texts_of(type(config)), dict[str, Plain]()
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Settings):
            value = plain(value)
        elif field.name in texts and value is not None:
            value = texts[field.name].show(value)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def flat(config: Settings) -> dict[str, Plain]:
    """`plain` by dotted names: {"optim.lr": 0.001, ...}."""
    values: dict[str, Plain] = {}
    for name, value in plain(config).items():
        inner = getattr(config, name)
        values |= (
            {f"{name}.{key}": v for key, v in flat(inner).items()} if isinstance(inner, Settings) else {name: value}
        )
    return values


def changed(config: S, values: Mapping[str, Plain]) -> S:
    """The settings with these values, by dotted names: `changed(config, {"optim.epochs": 3})`."""
    own: dict[str, Plain | Settings] = {}
    nested: dict[str, dict[str, Plain]] = {}
    for name, value in values.items():
        head, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    for head, inside in nested.items():
        try:
            own[head] = changed(getattr(config, head), inside)
        except SettingError as error:
            raise error.within(head) from None
    return replace(config, **own)


def filled(config: S, preset: Mapping[str, Plain]) -> S:
    """The settings with those that are None taken from a preset, by dotted names."""
    now = flat(config)
    return changed(config, {name: value for name, value in preset.items() if now[name] is None})


def full_name(config: type[Settings], name: str) -> str:
    """The dotted name of a setting.

    Raises:
        ConfigError: if there is no such setting, or several.
    """
    fits = full_names(config, name)
    if not fits:
        raise unknown("setting", name, flat(config()))
    if len(fits) > 1:
        raise ConfigError(f"{name} may be {' or '.join(fits)}: write one of them in full")
    return fits[0]


def full_names(config: type[Settings], name: str, known: Collection[str] | None = None) -> list[str]:
    """The dotted names that a short one may stand for: `epochs` for optim.epochs, `data` for data.name.

    `known`: all of them, where that is at hand.
    """
    known, name = list(flat(config())) if known is None else known, config.SHORT.get(name, name)
    if name in known:
        return [name]
    return [full for full in known if full.endswith(f".{name}")] or [full for full in known if full == f"{name}.name"]
