"""A study of several depths: every trial once, its rows, tables and heat-maps."""

from __future__ import annotations

import itertools
import statistics

import pytest

from tests.helpers import read_csv
from tests.study.test_html import Reader, row
from vit2dpe import ViT, load_run
from vit2dpe.cli import main
from vit2dpe.errors import ConfigError
from vit2dpe.models.card import card
from vit2dpe.study import StudyConfig, trials
from vit2dpe.study.heatmaps import cells, draw
from vit2dpe.study.html import Study, page
from vit2dpe.study.lengths import Perplexity
from vit2dpe.study.plan import Trial, check
from vit2dpe.study.rows import COLUMNS, Row, read_rows, to_csv
from vit2dpe.study.tables import table

pytestmark = pytest.mark.need("F1")
MICRO = ["study", "--encodings", "rope", "--sizes", "16,24", "--policies", "default", "--modes", "scale", "--smoke",
         "--width", "16", "--heads", "2", "--jobs", "1", "--device", "cpu"]  # fmt: skip


def rows(depths=(1, 2), part=("scale", "canvas"), encodings=("none", "rope"), seeds=(0, 1)):
    """A value that names all that it depends on."""
    found = []
    for depth, mode, (i, word), seed, size in itertools.product(
        depths, part, enumerate(encodings), seeds, (32, (32, 48))
    ):
        value = 10.0 * depth + 20 * i + (mode == "canvas") + 0.5 * seed + 2 * (size != 32)
        one = row(word, size, seed, value, mode=mode)
        found.append(Row(**{c: getattr(one, c) for c in COLUMNS} | dict(depth=depth)))
    return found


def test_each_depth_is_trained_once_and_stands_in_every_file(tmp_path, monkeypatch, capsys):
    out, trained, real = tmp_path / "out", [], trials.fit

    def fit(*args, folder, **kwargs):
        trained.append(folder.name.rpartition("-")[0])
        return real(*args, folder=folder, **kwargs)

    monkeypatch.setattr(trials, "fit", fit)
    assert main([*MICRO, "--depth", "2", "--out", str(out)]) == 0
    alone = (out / "results.csv").read_text()
    assert "depth" not in alone, "a study of one depth is as it was"
    assert main([*MICRO, "--depths", "1,2", "--out", str(out)]) == 0
    assert trained == ["rope-seed0", "rope-depth1-seed0"]
    assert "rope, depth 2, seed 0: finished before" in capsys.readouterr().out
    found = read_csv(out / "results.csv")
    assert tuple(found[0]) == COLUMNS[: COLUMNS.index("start")]
    assert [(r["depth"], r["height"]) for r in found] == [("1", "16.0"), ("1", "24.0"), ("2", "16.0"), ("2", "24.0")]
    for folder in (out / "cells").iterdir():
        depth = 1 if "-depth1-" in folder.name else 2
        assert len(load_run(folder).blocks) == depth
    summary = (out / "summary.md").read_text()
    assert "| mode | encoding | policy | depth 1 | depth 2 |" in summary
    assert "(heatmaps.png)" in summary
    assert (out / "heatmaps.png").read_bytes().startswith(b"\x89PNG")
    assert {s["depth"] for s in Reader((out / "report.html").read_text()).data["series"]} == {1, 2}
    assert main([*MICRO, "--depth", "2", "--out", str(out)]) == 0
    assert (out / "results.csv").read_text() == alone
    assert len(trained) == 2


def test_a_swin_has_stages_instead():
    with pytest.raises(ConfigError, match=r"depths are those of arch vit.*--stages"):
        check(StudyConfig.of(arch="swin", depths="1,2", encodings="relative"))
    assert check(StudyConfig.of(depths="2,1,2", quick=True)).depths == (2, 1)


def test_the_tables_average_over_seeds_and_never_over_depths():
    lines = table(rows()).splitlines()
    assert lines[0] == "top-1 in percent over depth, at image size 32"
    spread = statistics.stdev([0, 0.5])
    assert lines[4] == f"| scale | none | extrapolate | 10.2 ± {spread:.1f} | 20.2 ± {spread:.1f} |"
    assert f"| canvas, depth 2 | rope | extrapolate | none | 41.2 ± {spread:.1f} | 43.2 ± {spread:.1f} |" in lines
    assert "depth" not in table(rows(depths=(3,))).split("|")[0]


def test_the_cells_are_the_means_of_their_rows():
    scale, canvas = cells(rows())
    assert [one.title for one in scale] == ["scale, image size 32", "scale, depth 1", "scale, depth 2"]
    assert [one.columns for one in scale] == [["1", "2"], ["32", "32x48"], ["32", "32x48"]]
    assert scale[0].encodings == ["none", "rope"]
    assert scale[0].values == [[10.25, 20.25], [30.25, 40.25]]
    assert canvas[2].values == [[21.25, 23.25], [41.25, 43.25]]
    figure = draw(rows())
    shown = [[text.get_text() for text in ax.texts] for ax in figure.axes[:6]]
    assert shown[0] == ["10.2", "20.2", "30.2", "40.2"]
    assert {ax.get_xlabel() for ax in figure.axes[:6]} == {"depth [blocks]", "image size [pixels]"}


def test_sequences_of_older_tables_have_their_depth_in_the_mode():
    at = dict(train_height=1, train_width=16, height=1, policy="default", seed=0, metric="exact")
    old = [Row(encoding=word, mode=f"depth {depth}", width=width, value=10 * depth + width, **at)
           for word in ("none", "rope") for depth in (1, 2) for width in (16, 32)]  # fmt: skip
    assert {(one.blocks, one.part, one.panel) for one in old} == {(1, "", "depth 1"), (2, "", "depth 2")}
    ((over_depth, *over_length),) = cells(old)
    assert over_depth.values == [[26, 36], [26, 36]]
    assert [one.over for one in over_length] == ["length [tokens]"] * 2
    assert "| encoding | policy | depth 1 | depth 2 |" in table(old)
    half = [one for one in old if not (one.encoding == "rope" and one.blocks == 2)]
    assert [text.get_text() for text in draw(half).axes[0].texts] == ["26.0", "36.0", "26.0", "–"]


def test_the_page_has_a_line_for_each_depth(tmp_path):
    (tmp_path / "results.csv").write_text(to_csv(rows()))
    assert read_rows(tmp_path / "results.csv") == rows()
    read = Reader(page([Study("deep", rows(), {}), Study("one", [row("rope", 32)], {})]))
    assert read.data["modes"] == ["scale, depth 1", "scale, depth 2", "scale", "canvas, depth 1", "canvas, depth 2"]
    keys = {(s["study"], s["part"], s["depth"]) for s in read.data["series"]}
    assert keys == {*itertools.product([0], ["scale", "canvas"], [1, 2]), (1, "scale", None)}
    (point,) = [s["points"][0] for s in read.data["series"] if (s["mode"], s["name"]) == ("scale, depth 2", "none")]
    assert point["top1"][0:3:2] == [20.25, 2]
    assert {"heat", "heatmap", "heatover"} <= set(read.ids)


def test_a_card_is_of_one_model():
    of_two = [{c: str(getattr(one, c)) for c in COLUMNS} for one in rows(encodings=("rope",), seeds=(0,))]
    with pytest.raises(ConfigError, match="of 2 models"):
        card(ViT(img_size=32, depth=1, embed_dim=48, num_heads=3), results=of_two)


@pytest.mark.need("F1a")
def test_rows_that_were_measured_in_another_study_of_text_are_named_as_in_this_one():
    at = dict(train_height=1, train_width=16, height=1, width=16, policy="default", encoding="rope", value=9.0)
    one, named = Row(mode="all tokens", **at), Row(mode="all tokens, depth 2", depth=2, **at)
    for depths, rows_of in (("1,2", named), ("2", one)):
        plan = check(StudyConfig.of(task="text", depths=depths, encodings="rope", width=16, heads=2))
        measure = Perplexity(plan=plan, text=None, source=("", ""), classes=9)
        assert [measure.label(row, Trial("rope", 2, 0)) for row in (one, named)] == [rows_of] * 2
