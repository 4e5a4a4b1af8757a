"""The shape of the package: arrows run one way, importing is free, errors say something, nothing is unpickled."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vit2dpe

ROOT = Path(vit2dpe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part may import from the package; parts that are not named may import all but the command.
MAY_IMPORT = {
    "errors": set(),
    "positions": {"errors"},
    "signal": {"errors", "positions"},
    "kernels": {"errors", "positions", "signal"},
    "cache": {"errors", "positions"},
    "masks": {"errors", "positions"},
    "paths": {"errors", "positions", "signal", "kernels"},
    "attention": {"errors", "positions", "signal", "kernels", "cache", "paths"},
    "encodings": {"errors", "positions", "signal"},
}
MAY_IMPORT["layers"] = {*MAY_IMPORT, "kernels", "_timm"} - {"masks"}
MAY_IMPORT["policies"] = {"errors", "positions"}
MAY_IMPORT["scopes"] = {"errors", "encodings", "policies"}
MAY_IMPORT["resolution"] = {"errors", "encodings", "scopes"}
MAY_IMPORT["models"] = {*MAY_IMPORT, "layers"}


def part(path):
    """positions.py -> positions, encodings/rope.py -> encodings, __init__.py -> ''."""
    return path.relative_to(ROOT).with_suffix("").parts[0].replace("__init__", "")


def imported(source, package):
    """The parts of vit2dpe that a file of this dotted package imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "vit2dpe" and rest:
                first = rest.split(".")[0]
                found.add(vit2dpe._HOME.get(first, first).split(".")[0])
    return found


def package_of(path):
    return ".".join(("vit2dpe", *path.relative_to(ROOT).parts[:-1]))


def raised(source):
    """Every `raise` of our own errors or of ValueError and its like: (line, arguments or None)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            call = node.exc
            name = call.func if isinstance(call, ast.Call) else call
            if isinstance(name, ast.Name) and name.id.endswith("Error"):
                yield node.lineno, (call.args if isinstance(call, ast.Call) else None)


def says_something(arguments):
    """A message: there, not empty, and no {field} in a string that lost its f."""
    if not arguments:
        return False
    texts = [n.value for n in ast.walk(arguments[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    if isinstance(arguments[0], ast.Constant | ast.JoinedStr) and not "".join(texts).strip():
        return False
    return not any(re.search(r"\{[a-z_]\w*[^}]*\}", text) for text in texts)


@pytest.mark.parametrize(
    ("source", "package", "parts"),
    [
        ("from .signal import Signal", "vit2dpe", {"signal"}),
        ("from ..positions import Positions", "vit2dpe.encodings", {"positions"}),
        ("from .base import Sum", "vit2dpe.encodings", {"encodings"}),
        ("from .. import attention, attend", "vit2dpe.encodings", {"attention"}),
        ("def f():\n    import vit2dpe.models.vit", "vit2dpe", {"models"}),
        ("from vit2dpe import load_run, ViT", "vit2dpe", {"train", "models"}),
        ("import torch\nfrom timm.layers import Mlp", "vit2dpe", set()),
    ],
)
def test_the_reader_of_imports_reads(source, package, parts):
    assert imported(source, package) == parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    mine = part(path)
    if mine in ("", "cli", "__main__"):
        return
    others = imported(path.read_text(), package_of(path)) - {mine}
    if mine in MAY_IMPORT:
        assert others <= MAY_IMPORT[mine]
    else:
        assert "cli" not in others


def test_the_parts_are_there():
    assert {"errors", "positions", "signal", "attention", "encodings", "layers", "models"} <= {part(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_guards_anything(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not lines, "python -O drops asserts, and their message is empty: raise an error"


def unpickles(source, own_bytes=False):
    """Lines that may run a stranger's code or write a pickle; `own_bytes`: a round trip in memory is neither."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if not own_bytes and any(
                name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib") for name in names
            ):
                yield node.lineno
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if node.func.attr == "save" or not safe:
                yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.load(f)", [1]),
        ("torch.load(f, weights_only=False)", [1]),
        ("torch.load(f, weights_only=True)", []),
        ("torch.save(x, f)", [1]),
        ("import os, pickle", [1]),
        ("from pickle import loads", [1]),
        ("json.load(f)", []),
    ],
)
def test_the_reader_of_pickles_reads(source, lines):
    assert list(unpickles(source)) == lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_written_and_none_executed(path):
    # The contract promises that encodings survive pickling, and proves it on bytes of its own making.
    assert not list(unpickles(path.read_text(), own_bytes=part(path) == "testing"))


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("raise ValueError", False),
        ("raise ValueError()", False),
        ("raise ValueError('')", False),
        ("raise ValueError(f' ')", False),
        ("raise ValueError('got {size}')", False),
        ("raise ValueError(f'{size} and ' 'more {size!r}')", False),
        ("raise ValueError(f'got {size}')", True),
        ("raise ConfigError('a' + b)", True),
    ],
)
def test_the_reader_of_messages_reads(source, good):
    assert [says_something(arguments) for _, arguments in raised(source)] == [good]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_error_says_something(path):
    assert [line for line, arguments in raised(path.read_text()) if not says_something(arguments)] == []


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.split()


def test_importing_costs_nothing():
    code = "import sys, vit2dpe; print(*[m for m in ('torch', 'timm', 'torchvision', 'numpy') if m in sys.modules])"
    assert run(code) == []


ORDERS = ["import timm, vit2dpe", "import vit2dpe, timm", "import vit2dpe.layers, timm", "import timm, vit2dpe.layers"]


@pytest.mark.parametrize("order", ORDERS)
def test_timm_knows_our_names_whichever_is_imported_first(order):
    code = f"{order}\nprint(timm.is_model('vit2dpe_tiny_patch16_224'), vit2dpe.Positions.__name__)"
    assert run(code) == ["True", "Positions"]
