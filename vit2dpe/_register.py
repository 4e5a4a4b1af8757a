"""Registers our models when timm is imported (docs/decisions/0001)."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Leaves finding timm to the other finders, and imports our models once timm has been executed.

    A look-up alone (`importlib.util.find_spec("timm")`) changes nothing: the finder stays until timm is imported.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _import_names()

            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010 - a method of this one loader
        return spec


def _import_names() -> None:
    for module in ("vit2dpe.models", "vit2dpe.interop.timm.registry"):
        importlib.import_module(module)


def register_with_timm() -> None:
    """Now if timm is loaded, else as soon as it is."""
    if "timm" in sys.modules:
        _import_names()
    else:
        sys.meta_path.insert(0, _AfterTimm())
