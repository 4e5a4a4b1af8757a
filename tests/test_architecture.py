"""The shape of the package: rooms on floors, importing is free, errors say something, nothing is unpickled."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import vit2dpe
from tests.helpers import loaded_modules, printed

ROOT = Path(vit2dpe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A room may import rooms on lower floors. The ground floor's files may import each other, without circles.
GROUND = ("grids", "packed", "positions", "ranges", "seeding", "segments", "signal", "spec")
FLOORS: tuple[tuple[str, ...], ...] = (
    (*("_version", "contextual", "errors", "files", "modes"), *GROUND),
    ("encodings", "attention", "data"),
    ("resolution", "stock", "testing"),
    ("models",),
    ("interop", "plots"),
    ("training",),
    ("study",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ANYWHERE = {"", "__main__", "_register", "timm"}  # the doors: they name what they open
BIGGEST = 0.2  # share of the lines that one room may have


def name_of(path):
    return ".".join(("vit2dpe", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def room_of(module):
    """vit2dpe.positions -> positions, vit2dpe.encodings.rope -> encodings, vit2dpe -> ''."""
    return module.partition(".")[2].partition(".")[0]


MODULES = {name_of(path): path for path in FILES}


def imported(source, package, modules=MODULES):
    """The modules of vit2dpe that a file of this dotted package names, and the lines.

    At any depth of its code: in functions, under TYPE_CHECKING, and in strings "module:name" and "vit2dpe.module".
    Importing a name of the top is importing the module it comes from, and a part of a package the package too.
    """
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            names += (
                [base] if base in modules and base != "vit2dpe" else []
            )  # a package runs when a part is taken of it
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[a-z_]\w*(\.\w+)*:\w+", node.value):
                names = ["vit2dpe." + node.value.partition(":")[0]]
            elif re.fullmatch(r"vit2dpe(\.\w+)+", node.value):
                names = [node.value]
            names = [name for name in names if name in modules]
        for name in names:
            root, _, rest = name.partition(".")
            if root != "vit2dpe" or not rest:
                continue
            if rest in vit2dpe._HOME and name not in modules:
                name = f"vit2dpe.{vit2dpe._HOME[rest]}"
            while name not in modules:
                name = name.rpartition(".")[0]
            if name != "vit2dpe":
                yield name, node.lineno


def package_of(path):
    return ".".join(("vit2dpe", *path.relative_to(ROOT).parts[:-1]))


GRAPH = {name: list(imported(path.read_text(), package_of(path))) for name, path in MODULES.items()}


def wrong_way(graph):
    """(module, line, module) of every import that does not lead to a lower floor or stay in its room."""
    for module, others in graph.items():
        mine = room_of(module)
        for other, line in others:
            theirs = room_of(other)
            if mine in ANYWHERE or theirs == mine:
                continue
            if theirs in ANYWHERE or not (FLOOR[theirs] < FLOOR[mine] or FLOOR[theirs] == FLOOR[mine] == 0):
                yield module, line, other


def circles(graph):
    """Modules that import each other round about; packages stand for the names that they hand on."""
    done, found = set(), []

    def visit(module, way):
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for other, _ in graph[module]:
                if other != module:
                    visit(other, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


@pytest.mark.parametrize(
    ("source", "package", "modules"),
    [
        ("from .signal import Signal", "vit2dpe", {"signal"}),
        ("from ..positions import Positions", "vit2dpe.encodings", {"positions"}),
        ("from .base import Sum", "vit2dpe.encodings", {"encodings.base"}),
        ("from . import base", "vit2dpe.encodings", {"encodings", "encodings.base"}),
        ("from .. import attention, attend", "vit2dpe.encodings", {"attention"}),
        ("def f():\n    import vit2dpe.models.vit", "vit2dpe", {"models.vit"}),
        ("if TYPE_CHECKING:\n    from ..models import vit", "vit2dpe.data", {"models", "models.vit"}),
        ("from vit2dpe import load_run, ViT", "vit2dpe", {"training.checkpoint", "models"}),
        ("KINDS = {'ViT': 'models.vit:ViT'}", "vit2dpe.data", {"models.vit"}),
        ("import_module('vit2dpe.models.vit')", "vit2dpe.data", {"models.vit"}),
        ("import torch\nfrom timm.layers import Mlp\nx = 'a:b'", "vit2dpe", set()),
    ],
)
def test_the_reader_of_imports_reads(source, package, modules):
    assert {name.partition(".")[2] for name, _ in imported(source, package)} == modules


def test_every_module_has_a_room_and_every_room_a_module():
    rooms = {room_of(module) for module in MODULES} - ANYWHERE
    assert rooms == set(FLOOR)


def test_every_room_says_what_lives_there():
    missing = [room for room in FLOOR if not (ast.get_docstring(ast.parse(MODULES[f"vit2dpe.{room}"].read_text())))]
    assert missing == []


def test_imports_lead_downstairs():
    assert list(wrong_way(GRAPH)) == []


@pytest.mark.parametrize(
    ("module", "other", "wrong"),
    [
        ("models.vit", "attention.modules", False),
        ("attention.modules", "models.vit", True),
        ("models.vit", "interop.timm.convert", True),
        ("attention.modules", "encodings.rope", True),  # the same floor, another room
        ("signal", "positions", False),
        ("study.run", "cli.main", True),
        ("models.vit", "timm", True),
    ],
)
def test_an_import_upstairs_is_seen(module, other, wrong):
    assert bool(list(wrong_way({f"vit2dpe.{module}": [(f"vit2dpe.{other}", 1)]}))) is wrong


def test_nothing_imports_itself_round_about():
    assert circles({name: others for name, others in GRAPH.items() if room_of(name) not in ANYWHERE}) == []


def test_a_circle_is_seen():
    assert circles({"a": [("b", 1)], "b": [("c", 1)], "c": [("a", 2)]}) == [["a", "b", "c", "a"]]
    assert circles({"a": [("b", 1), ("c", 1)], "b": [("c", 1)], "c": []}) == []


def test_a_room_is_tested_in_the_folder_of_its_name():
    tests = Path(__file__).parent
    folders = {path.relative_to(tests).parts[0] for path in tests.glob("*/**/test_*.py")}
    rooms = {room for room in FLOOR if (ROOT / room).is_dir()}
    assert folders - {"benchmarks", "faults", "needs"} == rooms
    names = {path.name for path in tests.glob("test_*.py")}
    strays = [f"test_{room}.py" for room in rooms if f"test_{room}.py" in names]
    assert strays == [], "in the folder of the room"


def test_no_room_is_above_a_fifth():
    lines = {module: path.read_text().count("\n") for module, path in MODULES.items()}
    rooms = Counter()
    for module, count in lines.items():
        rooms[room_of(module)] += count
    room, count = rooms.most_common(1)[0]
    assert count <= BIGGEST * sum(lines.values()), f"{room} has {count} of {sum(lines.values())} lines"


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


def test_no_assert_guards_anything():
    lines = [
        (name, node.lineno)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
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


def test_no_pickle_is_written_and_none_executed():
    # The contract promises that encodings survive pickling, and proves it on bytes of its own making.
    found = {name: list(unpickles(path.read_text(), name == "vit2dpe.testing")) for name, path in MODULES.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


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


def test_every_error_says_something():
    silent = [
        (name, line)
        for name, path in MODULES.items()
        for line, arguments in raised(path.read_text())
        if not says_something(arguments)
    ]
    assert silent == []


def test_importing_costs_nothing():
    assert loaded_modules("import vit2dpe", {"torch", "timm", "torchvision", "numpy"}) == []


ORDERS = [
    "import timm, vit2dpe",
    "import vit2dpe, timm",
    "import vit2dpe.models.layers, timm",
    "import timm, vit2dpe.models.layers",
    "import vit2dpe, importlib.util; importlib.util.find_spec('timm'); import timm",
    "import vit2dpe, transformers, timm",
    "import vit2dpe, timm.layers",
    "import vit2dpe.interop.timm.convert; import timm",
]


@pytest.mark.need("A7")
@pytest.mark.parametrize("order", ORDERS)
def test_timm_knows_our_names_whichever_is_imported_first(order):
    code = f"{order}\nprint(timm.is_model('vit2dpe_tiny_patch16_224'), vit2dpe.Positions.__name__)"
    assert printed(code) == ["True", "Positions"]


def changing(source):
    """Lines that change a module-level object after import: `global`, and writes into its lists, dicts and sets."""
    tree = ast.parse(source)
    mutable = set()
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        made = isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp) or (
            isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in CONTAINERS
        )
        if made:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            mutable |= {target.id for target in targets if isinstance(target, ast.Name)}
    inside = [n for top in tree.body if not isinstance(top, ast.Assign | ast.AnnAssign) for n in ast.walk(top)]
    for node in inside:
        if isinstance(node, ast.Global):
            yield node.lineno
            continue
        owner = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITERS:
            owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id in mutable:
            yield node.lineno


CONTAINERS = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "WeakKeyDictionary", "WeakSet"}
WRITERS = {"append", "add", "update", "setdefault", "pop", "clear", "extend", "insert", "remove", "discard", "popitem"}
# Modules that write objects of their own top level, each with its reason. Registries such as ENCODINGS are written by
# those who add to them, from outside.
WRITTEN: dict[str, str] = {
    "vit2dpe.encodings.registry": "a word of an installed package joins when somebody asks for it",
    "vit2dpe.encodings.own": "what was imported in this process, as in sys.modules",
    "vit2dpe.study.replay": "whether this process runs a script again",
}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("A = {}\ndef f(): A[1] = 2", [2]),
        ("A = []\ndef f(): A.append(2)", [2]),
        ("A: dict = dict()\ndef f(): del A[1]", [2]),
        ("a = None\ndef f():\n    global a\n    a = 1", [3]),
        ("A = {1: 2}\ndef f(): return A[1]", []),
        ("def f():\n    A = []\n    A.append(1)", []),
    ],
)
def test_the_reader_of_shared_state_reads(source, lines):
    assert list(changing(source)) == lines


def test_nothing_at_the_top_of_a_module_changes_after_import():
    found = {name: list(changing(path.read_text())) for name, path in MODULES.items()}
    assert {name: lines for name, lines in found.items() if lines and name not in WRITTEN} == {}
