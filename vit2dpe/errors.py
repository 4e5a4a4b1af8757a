"""Errors that name what was required, what came, and the nearest thing that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class ConfigError(ValueError):
    """A setting that cannot work: an unknown name, an impossible size, a combination that makes no sense."""


class SettingError(ConfigError):
    """A setting whose value cannot be: its name, and the rest of the sentence."""

    def __init__(self, name: str, rest: str) -> None:
        super().__init__(name, rest)
        self.name, self.rest = name, rest

    def __str__(self) -> str:
        return self.name + self.rest

    def within(self, group: str) -> SettingError:
        """The same, of settings that are nested under this name."""
        return SettingError(f"{group}.{self.name}", self.rest)


class ArgumentError(ConfigError, TypeError):
    """An argument that a constructor does not have; a TypeError too, as from any other one in Python."""


class DataError(ValueError):
    """Data that are missing, unreadable or not laid out as required."""


class CheckpointError(ValueError):
    """A saved run that is incomplete, altered or for another model."""


class TrainingError(RuntimeError):
    """A training failed although its settings were valid: a bad loss, no memory, a full disk."""


class Stopped(SystemExit):
    """A signal stopped the training, after a save; the exit status is 128 + the signal's number."""


def clone() -> Path | None:
    """The clone of the repository, or the unpacked source, around this package; None where it is installed alone."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "recipes").is_dir() else None


def install(extra: str) -> str:
    """The line that installs an extra: in a clone the editable one."""
    return f'pip install "vit2dpe[{extra}]"' if clone() is None else f'pip install -e ".[{extra}]", in the clone'


def unknown(kind: str, name: str, known: Iterable[str], error: type[ConfigError] = ConfigError) -> ConfigError:
    """The error for a name that does not exist: the nearest one, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return error(f"unknown {kind} {name!r}; {hint}known: {', '.join(known)}")


def not_ours(model: object, lacks: str) -> ConfigError:
    """The error for a model that has nothing of this package, with the function that makes one of ours of it."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    makers = {"timm": "from_timm(model)", "transformers": "from_transformers(model)"}
    found = [maker for package, maker in makers.items() if package in packages] or list(makers.values())
    return ConfigError(f"{type(model).__name__} {lacks}; vit2dpe.{' or vit2dpe.'.join(found)} makes a model of ours")
