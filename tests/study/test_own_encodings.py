"""An encoding of one's own in every command and process: by --import, by a script, by an entry point."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.helpers import read_csv
from vit2dpe import ENCODINGS, ConfigError, Dims, build, load_run
from vit2dpe.cli import main
from vit2dpe.encodings import own
from vit2dpe.models.spec import ModelSpec
from vit2dpe.study import replay as module
from vit2dpe.study.jobs import each
from vit2dpe.study.replay import Needed, needed, replay
from vit2dpe.training.checkpoint import read_meta, save_model

ROOT = Path(__file__).parents[2]
NEAR = """
import torch
from vit2dpe import ENCODINGS, PositionEncoding
from vit2dpe.positions import distance


class Near(PositionEncoding):
    relative = True
    gives = frozenset({"bias"})

    def __init__(self, heads):
        super().__init__()
        self.s = torch.nn.Parameter(torch.full((heads,), 0.1))

    def bias(self, q, k):
        return -self.s[:, None, None] * distance(q, k)[:, None] ** 2


ENCODINGS["near"] = lambda dims: Near(dims.heads)
"""
STUDY = ["study", "--encodings", "near,near+rope", "--width", "24", "--depth", "1", "--heads", "2", "--smoke"]
STUDY += ["--sizes", "16,24", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """The words and the modules of before."""
    words, modules, files = dict(ENCODINGS), set(sys.modules), dict(own._FILES)
    yield
    ENCODINGS.clear()
    ENCODINGS.update(words)
    own._FILES.clear()
    own._FILES.update(files)
    for name in [name for name in set(sys.modules) - modules if name.startswith(("near", "encodings_"))]:
        del sys.modules[name]


@pytest.fixture
def near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.py").write_text(NEAR)
    return tmp_path / "near.py"


def rows(folder: Path) -> list[dict[str, str]]:
    table = read_csv(folder / "results.csv")
    return sorted(table, key=lambda row: [str(value) for value in row.values()])


def forget() -> None:
    ENCODINGS.pop("near")
    sys.modules.pop("near", None)


def test_a_study_of_several_processes_imports_it_in_each(near: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = near.parent / "two"
    assert main([*STUDY, "--import", "near.py", "--jobs", "2", "--out", str(out)]) == 0, capsys.readouterr().err
    folders = list((out / "cells").iterdir())
    assert [read_meta(folder / "last")["encodings"] for folder in folders] == [{"near": "near.py"}] * 2
    assert {row["encoding"] for row in rows(out)} == {"near", "near+rope"}


def test_a_run_names_what_to_import_and_imports_nothing(near: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.import_encodings("near.py")
    spec = ModelSpec("ViT", dict(position="near+rope", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2))
    about = dict(task="classification", data="folder", classes=list("ab"), mean=[0.5] * 3, std=[0.5] * 3)
    spec = ModelSpec("ViT", spec.arguments | dict(num_classes=2))
    save_model(near.parent / "run" / "last", spec.build(), spec.arguments, **about)
    forget()
    with pytest.raises(ConfigError, match=r"has the encoding 'near'.*made by near.py.*--import near.py.*never run"):
        load_run(near.parent / "run")
    assert "near" not in ENCODINGS
    from PIL import Image

    Image.new("RGB", (20, 20)).save(near.parent / "x.png")
    words = ["predict", str(near.parent / "run"), str(near.parent / "x.png")]
    assert main(words) == 2
    assert "--import near.py" in capsys.readouterr().err
    assert main([*words, "--import=near.py"]) == 0


def test_a_folder_without_encodings_of_ones_own_is_as_before(tmp_path: Path) -> None:
    spec = ModelSpec("ViT", dict(position="rope", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2))
    save_model(tmp_path, spec.build(), spec.arguments)
    assert "encodings" not in read_meta(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--position", "near", "--smoke", "--data", "digits", "--model.width", "24", "--model.heads", "2"],
        ["show", "near"],
        ["evaluate", "--model", "vit2dpe_tiny_patch4_32(position=near, embed_dim=24, num_heads=2, num_classes=10)",
         "--untrained", "--data", "digits", "--limit", "4"],
    ],
    ids=lambda line: line[0],
)  # fmt: skip
def test_commands_take_it(near: Path, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "near.png"] if line[0] == "show" else ["--out", "out", "--device", "cpu"]
    assert main([*line, *out]) == 2
    assert "near" in capsys.readouterr().err
    assert main([*line, *out, "--import", "near.py"]) == 0, capsys.readouterr().err


def test_which_commands_have_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    from vit2dpe.cli.commands import COMMANDS

    without = [name for name, command in COMMANDS.items() if not command.encodings]
    assert without == ["report", "recipes", "doctor"]
    assert main(["report", "--import", "near.py"]) == 2
    assert "unknown option --import" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--import" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "adds no encoding"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("from vit2dpe import ENCODINGS\nENCODINGS['rope'] = lambda dims: None", "takes the word 'rope'"),
        (None, "there is no such file"),
    ],
)
def test_what_is_no_file_of_encodings(tmp_path: Path, text: str | None, words: str) -> None:
    before = dict(ENCODINGS)
    if text is not None:
        (tmp_path / "near.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        own.import_encodings(str(tmp_path / "near.py"))
    assert before == ENCODINGS


def test_modules_and_unknown_words(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown encoding 'near'.*for one of your own: --import"):
        build("near", Dims(24, 2, (2, 3)))
    with pytest.raises(ConfigError, match=r"no module of this name; there is a file: --import near.py"):
        own.import_encodings("near")
    monkeypatch.syspath_prepend(str(near.parent))
    assert own.import_encodings("near") == ["near"]
    assert own.import_encodings("near") == ["near"]
    assert own.import_encodings("near.py") == ["near"]
    assert own.source_of("near") == "near.py"


@pytest.mark.parametrize("kind", ["function", "class"])
def test_an_installed_package_declares_it(near: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    name = "make" if kind == "function" else "Near"
    near.write_text(NEAR.replace('ENCODINGS["near"] =', "make ="))
    monkeypatch.syspath_prepend(str(near.parent))
    point = metadata.EntryPoint("near", f"near:{name}", "vit2dpe.encodings")

    def found(**wanted: str) -> metadata.EntryPoints:
        assert wanted.pop("group") == "vit2dpe.encodings"
        return metadata.EntryPoints([point]).select(**wanted)

    monkeypatch.setattr("vit2dpe.encodings.registry.entry_points", found)
    with pytest.raises(ConfigError, match="did you mean 'near'"):
        build("neer", Dims(24, 2, (2, 3)))
    assert build("near+rope", Dims(24, 2, (2, 3))).gives == {"bias", "rotation"}
    assert own.words_of(["near", "rope"]) == ["near"]
    assert own.source_of("near") == "near"


def test_a_script_is_run_again_up_to_its_study(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = near.parent / "script.py"
    script.write_text(
        NEAR
        + "from vit2dpe.study import study\ntry:\n    study(None)\nexcept Exception:\n    pass\nraise SystemError\n"
    )
    fake = ModuleType("__main__")
    fake.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", fake)
    ENCODINGS["near"] = SimpleNamespace(__module__="__main__")
    assert needed(["rope", "alibi"]) == Needed()
    found = needed(["near+rope"])
    assert found == Needed(("near",), (), str(script), str(script))
    ENCODINGS.pop("near")
    replay(found)
    assert build("near", Dims(24, 2, (2, 3))).gives == {"bias"}
    assert own.source_of("near") == str(script)
    assert module._REPLAYING.get() is False


def test_a_word_typed_into_a_session_runs_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    ENCODINGS["near"] = SimpleNamespace(__module__="__main__")
    threads = torch.get_num_threads()
    try:
        found = each(lambda trial, _: trial, ["a", "b"], print, jobs=2, encodings=["near"])
        assert list(found) == [(0, "a"), (1, "b")]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert "one trial at a time" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("where", ["script", "session", "module"])
def test_a_script_gives_the_rows_of_the_command(near: Path, where: str, guard: bool) -> None:
    words = ["vit2dpe", *STUDY, "--import", "near.py", "--jobs", "2", "--out", "command"]
    code = "import sys; from vit2dpe.cli import main; sys.exit(main())"
    run = dict(cwd=near.parent, check=True, timeout=300, capture_output=True, text=True)
    subprocess.run([sys.executable, "-c", code, *words[1:]], **run)
    call = (
        "from vit2dpe.study import StudyConfig, study\n"
        "study(StudyConfig.of(encodings='near,near+rope', width=24, depth=1, heads=2, smoke=True, sizes='16,24',"
        " device='cpu', threads=1, jobs=2, out='script'))\n"
    )
    if guard:
        call = 'if __name__ == "__main__":\n' + "".join(f"    {line}\n" for line in call.splitlines())
    text = ("import near\n" if where == "module" else NEAR) + call
    (near.parent / "script.py").write_text(text)
    subprocess.run([sys.executable, *(["-c", text] if where == "session" else ["script.py"])], **run)
    assert rows(near.parent / "script") == rows(near.parent / "command")


@pytest.mark.slow
@pytest.mark.parametrize("words", ["rope,alibi", "near,near+rope"])
def test_a_notebook_gives_the_rows_of_the_command(near: Path, words: str) -> None:
    """In two processes, or, for what is typed into a cell, one after the other."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    typed = ["study", "--encodings", words, *STUDY[3:], *(["--import", "near.py"] if "near" in words else [])]
    code = f"from vit2dpe.cli import main; main({[*typed, '--jobs', '2', '--out', 'command']})"
    subprocess.run([sys.executable, "-c", code], cwd=near.parent, check=True, timeout=300, capture_output=True)
    call = (
        "from vit2dpe.study import StudyConfig, study\n"
        f"study(StudyConfig.of(encodings='{words}', width=24, depth=1, heads=2, smoke=True, sizes='16,24',"
        " device='cpu', threads=1, jobs=2, out='notebook'))"
    )
    cells = [nbformat.v4.new_code_cell(text) for text in ([NEAR, call] if "near" in words else [call])]
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=300, kernel_name="python3")
    client.execute(cwd=str(near.parent))
    assert rows(near.parent / "notebook") == rows(near.parent / "command")
