"""Text of any script in pictures: no box, no formula and no warning, since warnings are errors here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from matplotlib import font_manager

from tests.study.test_html import rows
from vit2dpe.cli import main
from vit2dpe.plots import letters
from vit2dpe.plots.figures import save_figure
from vit2dpe.plots.text_attention import draw
from vit2dpe.study.html import merge
from vit2dpe.study.report import Report

pytestmark = pytest.mark.need("F4")
TOKENS = [
    ("漢", "U+6F22"), ("a漢b", "a U+6F22 b"), ("$x$", "$x$"), ("$$", "$$"), ("\\$", "\\$"), ("_a_", "_a_"),
    ("سلام", "سلام"), ("שלום", "שלום"), ("😀", "😀"),
    ("👨\u200d👩", "U+1F468 U+200D U+1F469"), ("\x07", "U+0007"), ("\udcff", "U+DCFF"),
    ("\u0301", "◌\u0301"), ("\u00a0", "U+00A0"), ("é", "é"), (" a\n", "␣a⏎"), ("\ufffd", "\ufffd"),
    ("w" * 40, "w" * 23 + "…"),
    ("", ""),
]  # fmt: skip


@pytest.fixture
def dejavu_alone(monkeypatch):
    """What matplotlib itself brings, and none of this machine's fonts."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_tokens_of_every_script(dejavu_alone, tmp_path, suffix):
    names = [token for token, _ in TOKENS]
    figure = draw({"blocks.0.attn": torch.rand(1, 1, len(names), len(names))}, names, names, "attention")
    assert save_figure(figure, tmp_path / f"a.{suffix}").stat().st_size > 5000
    for ax in (ax for ax in figure.axes if ax.images):
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert [label.get_text() for label in labels] == [written for _, written in TOKENS]
            assert not any(label.get_parse_math() for label in labels)


def test_a_font_that_has_them_is_used(dejavu_alone, tmp_path):
    files = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"}
    there = letters.letters(font_manager.findfont("DejaVu Sans"))
    letter = next(
        chr(code) for code in sorted(letters.letters(files["STIXGeneral"]) - there) if letters._visible(chr(code))
    )
    found = letters.legible([f"a{letter}"])
    assert found.texts == [f"a{letter}"]
    (other,) = found.families[1:]
    assert ord(letter) in letters.letters(font_manager.findfont(other))
    figure = draw({"attn": torch.rand(1, 1, 1, 1)}, [letter], [letter], "attention")
    save_figure(figure, tmp_path / "a.png")
    assert figure.axes[0].get_xticklabels()[0].get_fontfamily() == found.families
    assert letters.legible(["plain"]).families == found.families[:1], "others are looked for where they are needed"


def test_fonts_of_boxes_and_of_pixels_have_no_letters(tmp_path, monkeypatch):
    assert not any("resort" in name.lower() for name in letters._other_fonts())
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert letters.letters(str(tmp_path / "broken.ttf")) == frozenset()


@pytest.mark.need("F4a")
def test_folders_whose_names_are_no_utf8(tmp_path, capsys):
    """In the page, the summary and what is printed."""
    folder = tmp_path / os.fsdecode(b"st\xffdy")
    about = dict(command=f"vit2dpe study --root {folder}", data=str(folder), hardware="", torch="", timm="", vit2dpe="")
    report = Report(folder, about, total=1, started=0.0)
    report.add(0, "rope", rows()[:6])
    assert "st\\udcffdy" in (folder / "summary.md").read_text()
    assert "st\\udcffdy" in (folder / "report.html").read_text()
    assert "st\\udcffdy" in merge([folder], tmp_path / "all.html").read_text()
    code = "import sys; from vit2dpe.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", str(folder), "--out", str(folder / "b.html")]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert b"st\\udcffdy" in done.stdout


@pytest.mark.need("F4b")
def test_where_a_picture_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.png").mkdir()
    for out, start in (
        ("new/a.svg", b"<?xml"),
        ("new/b.pdf", b"%PDF"),
        ("new/c.PNG", b"\x89PNG"),
        ("new/d", b"\x89PNG"),
    ):
        assert main(["show", "alibi", "--grid", "3x4", "--out", out]) == 0
        written = tmp_path / capsys.readouterr().out.strip()
        assert written.read_bytes().startswith(start)
    assert written.name == "d.png"
    for out, says in (
        ("a.docx", "a picture's suffix says its format: one of"),
        ("file/a.png", "cannot write the picture file/a.png"),
        ("folder.png", "cannot write the picture folder.png: Is a directory"),
    ):
        assert main(["show", "alibi", "--grid", "3x4", "--out", out]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert main(["show", "alibi", "--grid", "4x4x4"]) == 2
    assert "one or two axes" in capsys.readouterr().err
