"""What may grow no further: private names of other packages, `Any`, `type: ignore`, the length of a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vit2dpe

ROOT = Path(vit2dpe.__file__).parent
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
LINES = sum(source.count("\n") for source in SOURCES.values())
LONGEST = 400
MOST_ANY, MOST_IGNORED = 8.0, 1.0  # in 1,000 lines
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # documented, of namedtuples and of os

# Private names of torch and timm that the package uses, each for want of a public one.
MOST_PRIVATE = 6
PRIVATE = {
    "torch.utils._python_dispatch.TorchDispatchMode is documented, its module's name is private": {"_python_dispatch"},
    "whether a transform of torch.func is active, torch._C._functorch alone can tell": {"_C", "_functorch"},
    "whether a hook may see what a module gives": {
        "_forward_hooks", "_forward_pre_hooks", "_has_any_global_hook"
    },
    "the operator of softmax's backward pass, without its forward": {"_softmax_backward_data"},
    "the operators of memory-efficient attention: its backward for some images at a time, without another forward": {
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"
    },
    "timm.models._input: timm's own rules of set_input_size and of model arguments": {"_input"},
}  # fmt: skip


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_its_own(trees: list[ast.Module]) -> set[str]:
    """Every name that these files define, assign or take as an argument."""
    own: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
    return own


def foreign_private_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[str, int]]:
    """(name, line) of attributes and imports that begin with an underscore and are not the package's own."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [] if node.attr in own else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [part for alias in node.names for part in f"{node.module}.{alias.name}".split(".")]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        for name in dict.fromkeys(names):
            if private(name) and name not in PUBLIC:
                yield name, node.lineno


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._dynamo.reset()", {"_dynamo"}),
        ("from timm.models._input import x", {"_input"}),
        ("from jsonargparse import _typing", {"_typing"}),
        ("import torch.utils._pytree as tree", {"_pytree"}),
        ("parser._actions", {"_actions"}),
        ("class A:\n    def f(self):\n        self._x = 1\n        return self._x, self._y", {"_y"}),
        ("def _f(): ...\nmodule._f()", set()),
        ("row._replace(a=1)\nrow.__dict__", set()),
        ("from .._version import __version__", set()),
    ],
)
def test_the_reader_of_private_names_reads(source, names):
    tree = ast.parse(source)
    assert {name for name, _ in foreign_private_names(tree, names_of_its_own([tree]))} == names


def test_private_names_of_others_are_listed_with_a_reason():
    trees = {path: ast.parse(source) for path, source in SOURCES.items()}
    own = names_of_its_own(list(trees.values()))
    used = [(name, f"{path}:{line}") for path, tree in trees.items() for name, line in foreign_private_names(tree, own)]
    listed = set().union(*PRIVATE.values())
    assert len(PRIVATE) <= MOST_PRIVATE
    new = [use for use in used if use[0] not in listed]
    assert new == [], "find a public way; there is one for most things (torch.library, named_buffers, state_dict)"
    assert listed - {name for name, _ in used} == set(), "no longer used: take them out of PRIVATE"


@pytest.mark.parametrize(("pattern", "most"), [(r"\bAny\b", MOST_ANY), ("type: ignore", MOST_IGNORED)])
def test_types_are_said(pattern, most):
    counts = {path: len(re.findall(pattern, source)) for path, source in SOURCES.items()}
    worst = sorted(counts.items(), key=lambda item: -item[1])[:5]
    share = 1000 * sum(counts.values()) / LINES
    assert share <= most, (
        f"{share:.1f} in 1,000 lines; most of them in {worst}: a Protocol, a dataclass or a union says it"
    )


def test_a_file_is_read_in_one_go():
    long = {path: source.count("\n") for path, source in SOURCES.items() if source.count("\n") > LONGEST}
    assert long == {}
