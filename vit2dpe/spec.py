"""What users type: encoding and policy specs, sizes and comma-separated lists, parsed once."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from .errors import ConfigError, unknown


def check_option(kind: type, name: str, value: Any) -> None:
    """Refuse a value that is not of the type the constructor names: rope(base=ten), relative(shared=maybe)."""
    wanted = get_type_hints(kind.__init__).get(name, Any)  # type: ignore[misc]
    allowed = tuple(get_origin(part) or part for part in get_args(wanted) or (wanted,))
    fits = Any in allowed or type(value) in allowed or (float in allowed and type(value) is int)
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"option {name} of {kind.__name__} must be {_spell(wanted)}, got {value!r}")


def _spell(wanted: Any) -> str:
    kinds = [kind.__name__ for kind in get_args(wanted) or (wanted,) if kind is not type(None)]
    return " or ".join("a finite number" if kind == "float" else kind for kind in kinds)


def parse_terms(word: str, kind: str, known: Iterable[str]) -> list[tuple[str, dict[str, Any]]]:
    """[(name, options), ...] of a sum of terms such as "sincos+rope(base=10)".

    Args:
        kind: what the names are names of, for the error.
        known: the names that are allowed.

    Raises:
        ConfigError: if it cannot be read, or a name is not among `known`.
    """
    known = list(known)
    try:
        tree = ast.parse(word.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _unreadable(word) from None
    parts = [_term(node, word) for node in _summands(tree)]
    for name, _ in parts:
        if name not in known:
            raise unknown(kind, name, known)
    return parts


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _term(node: ast.expr, word: str) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    if isinstance(node, ast.Call) and not node.args and all(k.arg for k in node.keywords):
        options = {str(k.arg): _value(k.value, word) for k in node.keywords}
        node = node.func
    if not isinstance(node, ast.Name):
        raise _unreadable(word)
    return node.id, options


def _value(node: ast.expr, word: str) -> Any:
    """A number, a quoted string, a tuple, true or false, or a bare word."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _unreadable(word) from None


def _unreadable(word: str) -> ConfigError:
    return ConfigError(
        f"cannot read {word!r}: write names joined by '+', options in parentheses, as in 'sincos+rope(base=10)'"
    )


Size = tuple[int, int]


def parse_size(text: str | int) -> Size:
    """(height, width) of "32" or "32x48"."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"a size is written 32 or 32x48 (height x width, pixels), got {text!r}")
    return int(parts[0]), int(parts[-1])


def split_words(text: str) -> list[str]:
    """Comma-separated words; commas inside parentheses stay: "rope(base=10),yarn(beta_fast=2, beta_slow=1)"."""
    words, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            words.append(text[start:i])
            start = i + 1
    return [word.strip() for word in [*words, text[start:]] if word.strip()]
