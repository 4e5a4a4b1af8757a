"""The encodings of one's own in the processes of a study, whether they stand in a module, a file or the script itself.

A new process starts without the script that started the study: Python would run it again, and without a guard
(`if __name__ == "__main__"`) that would start the study anew. It imports what defines the words instead. For words that
the script defines itself it runs the script up to the call of `study`, and not beyond.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..encodings import ENCODINGS
from ..encodings.own import import_encodings, module_of, record_source, source_of, words_of
from ..encodings.registry import from_entry_point

_MAIN = "__mp_main__"  # what multiprocessing calls a script that it runs again
_REPLAYING = ContextVar("replaying", default=False)


class Needed(NamedTuple):
    """Encodings of one's own, and where they come from.

    Args:
        words: their names.
        sources: files and modules, and what was typed for them.
        script: the path of the script, or the name of the module that is run by `python -m`, if it defines some.
        typed: what the record of a run has of the script.
    """

    words: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    script: str | None = None
    typed: str = ""


class _Enough(BaseException):
    """The script has come to its study; no Exception, so that a script's own handlers let it pass."""


def needed(specs: Sequence[str]) -> Needed | None:
    """What another process needs for these specs; None where it cannot have it: typed into a session."""
    main, sources, script, typed = sys.modules["__main__"], dict[str, str](), None, ""
    words = words_of(specs)
    for word in words:
        source = source_of(word)
        if module_of(word) == "__main__":
            script, typed = _script(main), source
            if script is None:
                return None
        else:
            sources[str(Path(source).resolve()) if source.endswith(".py") else source] = source
    return Needed(tuple(words), tuple(sources.items()), script, typed)


def _script(main: ModuleType) -> str | None:
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return str(spec.name)
    return str(Path(file).resolve()) if file is not None and Path(file).is_file() else None


def replay(own: Needed) -> None:
    """Make the words known in this process."""
    if all(word in ENCODINGS or from_entry_point(word) for word in own.words):
        return
    for source, typed in own.sources:
        import_encodings(source, typed)
    if own.script is not None:
        record_source(_MAIN, own.typed)
        token = _REPLAYING.set(True)
        try:
            with suppress(_Enough):
                if own.script.endswith(".py") or Path(own.script).is_file():
                    runpy.run_path(own.script, run_name=_MAIN)
                else:
                    runpy.run_module(own.script, run_name=_MAIN, alter_sys=True)
        finally:
            _REPLAYING.reset(token)


def stop_replay() -> None:
    """Called where a study begins: end the script that is run again for its encodings alone."""
    if _REPLAYING.get():
        raise _Enough


@contextmanager
def without_main(unless: Callable[..., object]) -> Iterator[None]:
    """Processes that are started within it do not run the script again, unless this function stands in it."""
    main, function = sys.modules["__main__"], unless.func if isinstance(unless, partial) else unless
    if function.__module__ == main.__name__:
        yield
        return
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
