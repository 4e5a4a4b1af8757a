"""The settings of a YAML file, by dotted names; what YAML would take silently is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args, get_origin, get_type_hints

from ..errors import ConfigError, unknown
from ..spec import Plain, Settings, Words, flat, full_names

if TYPE_CHECKING:
    from yaml import MappingNode, Node

Others = Callable[[], Mapping[str, type[Settings]]]  # the settings of other commands, by their names


def read_yaml(path: str, config: type[Settings], others: Others = dict) -> dict[str, Plain]:
    """The settings of a file.

    Args:
        others: gives the settings of other commands, by which a file of theirs is recognized.

    Raises:
        ConfigError: for a file that is not there or no YAML, a key given twice, a number that is not finite, and a
            setting that does not exist, with the command that has it, or the nearest one.
    """
    import yaml

    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} holds no settings: write name: value")
        if root is not None:
            _refuse_twice(path, root)
        values: dict[str, Plain] = {}
        for leaf in [] if root is None else _leaves(root, config):
            if not leaf.setting:
                for command, other in others().items():
                    if other is not config and root and all(one.setting for one in _leaves(root, other)):
                        raise ConfigError(
                            f"{path} is for another command, which has {leaf.name}: vit2dpe {command} --config {path}"
                        )
                raise unknown(f"setting in {path}", leaf.name, sorted(flat(config())))
            if leaf.setting in values:
                raise ConfigError(f"{path}: {leaf.name} is given twice, again in line {leaf.line}")
            values[leaf.setting] = _value(path, leaf, config)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from None
    return values


def _refuse_twice(path: str, group: MappingNode, prefix: str = "") -> None:
    """YAML's own loader lets the last of equal keys win."""
    import yaml

    seen = set()
    for key, value in group.value:
        name = f"{prefix}{key.value}"
        if name in seen:
            raise ConfigError(f"{path}: {name} is given twice, again in line {key.start_mark.line + 1}")
        seen.add(name)
        if isinstance(value, yaml.MappingNode):
            _refuse_twice(path, value, f"{name}.")


class _Leaf(NamedTuple):
    """A key as it is written, its line, its value, and the setting it names: "" where there is none or several."""

    name: str
    line: int
    node: Node
    setting: str


def _leaves(
    group: MappingNode, config: type[Settings], prefix: str = "", known: Collection[str] | None = None
) -> Iterator[_Leaf]:
    """The keys that are no groups of settings; a group without anything in it has none."""
    import yaml

    known = list(flat(config())) if known is None else known
    for key, value in group.value:
        name = f"{prefix}{key.value}"
        if any(full.startswith(f"{name}.") for full in known):
            if isinstance(value, yaml.MappingNode):
                yield from _leaves(value, config, f"{name}.", known)
                continue
            if value.tag.endswith(":null"):
                continue
        full = full_names(config, name, known)
        yield _Leaf(name, key.start_mark.line + 1, value, full[0] if len(full) == 1 else "")


def _value(path: str, leaf: _Leaf, config: type[Settings]) -> Plain:
    """A number or a word such as no, where a text is wanted, is that text."""
    import yaml

    node = leaf.node
    if isinstance(node, yaml.ScalarNode):
        if re.fullmatch(r"[+-]?\.?(nan|inf)", node.value.lower()):
            raise ConfigError(f"{path}: {leaf.name} must be a finite number, got {node.value}")
        kind = node.tag.rpartition(":")[2]
        number = kind in ("int", "float", "timestamp") or (
            kind == "bool" and node.value.lower() not in ("true", "false")
        )
        if number and _hint(config, leaf.setting) in (str, str | None):
            return str(node.value)
        if kind == "str" and node.value.lower() == "none" and _nullable(_hint(config, leaf.setting)):
            return None
        if kind == "str" and "," in node.value and several_numbers(_hint(config, leaf.setting)):
            node = yaml.compose(f"[{node.value}]", Loader=yaml.SafeLoader) or node
    joint = _joint(config, leaf.setting)
    if isinstance(node, yaml.SequenceNode) and joint and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return joint.join(str(item.value) for item in node.value)
    value: Plain = yaml.SafeLoader("").construct_object(node, deep=True)
    return value


def _nullable(hint: object) -> bool:
    """Whether a type may be null, and holds no text that may be the word none."""
    return type(None) in get_args(hint) and hint not in (str | None, Words | None)


def several_numbers(hint: object) -> bool:
    """Whether a type is a tuple of numbers, or that or null."""
    return any(get_origin(kind) is tuple and set(get_args(kind)) <= {int, float} for kind in (hint, *get_args(hint)))


def _joint(config: type[Settings], name: str) -> str | None:
    """What stands between the items of a text that may be written as a list, by the field's metadata "list"."""
    head, _, rest = name.partition(".")
    if rest:
        return _joint(get_type_hints(config)[head], rest)
    return next((field.metadata.get("list") for field in fields(config) if field.name == head), None)


def _hint(config: type[Settings], name: str) -> object:
    """The type of a setting, by its dotted name."""
    head, _, rest = name.partition(".")
    hint = get_type_hints(config)[head]
    return _hint(hint, rest) if rest else hint
