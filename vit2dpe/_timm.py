"""Registers our models when timm is imported (docs/decisions/0001)."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys


class _WhenTimmArrives(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the import of timm go its way, and our models follow it."""

    def find_spec(self, name, path=None, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                # Where `layers` brings timm, it is not whole yet, and registers them itself at its end.
                if f"{__package__}.layers" not in sys.modules:
                    importlib.import_module("vit2dpe.models")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_timm() -> None:
    """Now if timm is loaded, else as soon as it is."""
    if "timm" in sys.modules:
        importlib.import_module("vit2dpe.models")
    else:
        sys.meta_path.insert(0, _WhenTimmArrives())
