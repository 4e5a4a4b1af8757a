"""Encodings of one's own: where their words come from, and how another process, or a later one, gets them.

A word is added by a line of code, `ENCODINGS["near"] = ...`. That code is run because somebody imports it: by
`--import near.py` of a command, by `import near` in Python, or by asking for a word that an installed package declares
under the entry point group `vit2dpe.encodings`. Nothing else runs code: a run folder names its own, and no more.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from ..errors import ConfigError
from ..spec import Plain, join_blocks, read_terms, split_blocks
from .base import PositionEncoding
from .registry import ENCODINGS, Builder, from_entry_point, of_class

_FILES: dict[str, str] = {}  # module -> the file that it was imported from, as it was typed


def import_encodings(source: str, typed: str | None = None) -> list[str]:
    """Run a file, or import a module, that adds encodings; once in a process.

    Args:
        source: "near.py", "folder/near.py", or the dotted name of a module.
        typed: what the user wrote for it, for the record; default `source`.

    Returns:
        the words that it has added.

    Raises:
        ConfigError: if there is no such file or module, it fails, adds no word, or takes one that is ours.
    """
    before = dict(ENCODINGS)
    try:
        module = _run_file(Path(source).expanduser(), typed or source) if _is_file(source) else _import(source)
    except ConfigError:
        raise
    except Exception as error:  # whatever the code of others raises
        ENCODINGS.clear()
        ENCODINGS.update(before)
        raise ConfigError(f"--import {source} failed: {type(error).__name__}: {error}") from error
    taken = [word for word, make in before.items() if ENCODINGS.get(word) is not make and is_ours(make)]
    if taken:
        ENCODINGS.update({word: before[word] for word in taken})
        raise ConfigError(f"--import {source} takes the word {taken[0]!r}, which vit2dpe has already: write another")
    words = [word for word, make in ENCODINGS.items() if _module(make).partition(".")[0] == module.partition(".")[0]]
    words = [word for word in ENCODINGS if word not in before or word in words]
    if not words:
        raise ConfigError(
            f'--import {source} adds no encoding; a line of it must be ENCODINGS["word"] = lambda dims: ..., '
            "see docs/adding-an-encoding.md"
        )
    return words


def record_source(module: str, source: str) -> None:
    """Name what a module was run from: the script that is run again in another process."""
    _FILES[module] = source


def is_ours(make: Callable[..., PositionEncoding]) -> bool:
    """Whether an encoding comes with this package."""
    return _module(make).partition(".")[0] == "vit2dpe"


def words_of(specs: Iterable[str]) -> list[str]:
    """The words in specifications that are encodings of one's own."""
    words = dict.fromkeys(name for spec in specs for word in split_blocks(spec) for name, _ in read_terms(word))
    return [word for word in words if word in ENCODINGS and not is_ours(ENCODINGS[word])]


def module_of(word: str) -> str:
    """The module that a word's encoding is written in."""
    return _module(ENCODINGS[word])


def source_of(word: str) -> str:
    """What to import for a word: a file as it was typed, a script, or a module."""
    name = module_of(word)
    if name in _FILES:
        return _FILES[name]
    if name == "__main__":
        return str(getattr(sys.modules[name], "__file__", None) or "the session that trained it")
    return name


def sources_in(arguments: Mapping[str, Plain]) -> dict[str, str]:
    """Word -> source, of the encodings of one's own that the arguments of a model name."""
    named: dict[str, str] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            named |= sources_in(value)
        elif name.endswith("position") and isinstance(spec := join_blocks(value), str):
            named |= {word: source_of(word) for word in words_of([spec])}
    return named


def check_known(sources: Mapping[str, str], where: str) -> None:
    """Refuse a model with an encoding that is not known here, with what has to be imported first.

    Args:
        sources: what the folder says of its encodings, for the sentence; never imported.
        where: the folder.
    """
    for word, source in sources.items():
        if word not in ENCODINGS and not from_entry_point(word):
            raise ConfigError(
                f"{where} has the encoding {word!r}, which is not known here; it was made by {source}: add --import "
                f"{source} to the command, or import it in Python; code that a run folder names is never run by itself"
            )


def _is_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source


def _import(name: str) -> str:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        hint = f"; there is a file: --import {name}.py" if Path(f"{name}.py").is_file() else ""
        raise ConfigError(f"--import {name}: there is no module of this name{hint}")
    importlib.import_module(name)
    return name


def _run_file(path: Path, source: str) -> str:
    """The module that a file becomes: under its own name, where that is free."""
    if not path.is_file():
        raise ConfigError(f"--import {source}: there is no such file")
    place = path.resolve()
    for name, module in list(sys.modules.items()):
        if name != "__main__" and getattr(module, "__file__", None) == str(place):
            _FILES.setdefault(name, source)
            return name
    free = path.stem.isidentifier() and path.stem not in sys.modules
    found = importlib.util.find_spec(path.stem) if free else None
    free = free and (found is None or found.origin == str(place))
    name = path.stem if free else f"encodings_{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--import {source}: a file of Python ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _FILES[name] = module, source
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name], _FILES[name]
        raise
    return name


def _module(make: Callable[..., PositionEncoding]) -> str:
    """The module that what builds an encoding is written in."""
    if isinstance(make, Builder):
        return make.encoding.__module__
    if isinstance(make, partial):
        return _module(make.args[0] if make.func is of_class else make.func)
    return str(getattr(make, "__module__", None) or type(make).__module__)
