"""The study's page: what is in it, that it fetches nothing, and, where there is a browser, that it works."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.helpers import read_csv
from vit2dpe.cli import main
from vit2dpe.errors import DataError
from vit2dpe.study.html import Study, merge, page, read_study
from vit2dpe.study.rows import Row

RESULTS = sorted((Path(__file__).parents[2] / "recipes/results").glob("*/results.csv"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def row(word="rope", size=32, seed=0, top1=50.0, *, policy="extrapolate", mode="scale", train=32):
    h, w = size if isinstance(size, tuple) else (size, size)
    size = dict(train_height=float(train), train_width=float(train), height=float(h), width=float(w))
    score = dict(top1=top1, loss=1.0 - top1 / 100, n=10.0, value=top1)
    return Row(encoding=word, policy=policy, mode=mode, seed=float(seed), **size, **score)


def rows():
    found = []
    for seed in (0, 1, 2):
        for size, loss in ((32, 0.0), (48, 10.0), ((32, 48), 3.0), (64, 20.0), (96, 30.0), (128, 40.0)):
            found.append(row("rope", size, seed, 80.0 + seed - loss))
            found.append(row("rope", size, seed, 81.0 - seed - loss / 2, policy="ntk"))
            found.append(row("a<b>&amp;", size, seed, 60.0 - loss, mode="canvas"))
    return found


class Reader(HTMLParser):
    """Tables as lists of rows, the JSON, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.data, self.fetched, self.ids, self.opened = [], "", [], [], []
        self.inside = ""
        self.feed(text)
        self.data = json.loads(self.data)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside = "data" if attrs.get("id") == "data" else tag
        self.ids.append(attrs.get("id"))
        if tag not in ("meta", "link", "input", "br"):
            self.opened.append(tag)
        self.fetched += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "poster") and v != "data:,"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "data":
            self.data += text
        elif self.inside in ("td", "th", "button") and self.tables and self.tables[-1]:
            self.tables[-1][-1][-1] += text


def test_means_deviations_and_counts_are_those_of_the_rows():
    read = Reader(page([Study("one", rows(), {})]))
    (series,) = [s for s in read.data["series"] if s["name"] == "rope" and s["policy"] == "extrapolate"]
    assert [p["label"] for p in series["points"]] == ["32", "32x48", "48", "64", "96", "128"]
    assert series["points"][1]["x"] == pytest.approx(math.sqrt(32 * 48))
    half = 4.302652729911275 / math.sqrt(3)  # t of two degrees of freedom, a deviation of 1
    interval = [pytest.approx(81 - half), pytest.approx(81 + half)]
    assert series["points"][0]["top1"] == [81.0, statistics.stdev([80, 81, 82]), 3, *interval]
    assert series["first"]
    assert not next(s for s in read.data["series"] if s["policy"] == "ntk")["first"]
    assert read.data["names"] == ["rope", "a<b>&amp;"]
    assert read.data["modes"] == ["scale", "canvas"]
    assert read.data["train"] == [32.0]
    assert [m["key"] for m in read.data["measures"]] == ["top1", "loss"]


def test_intervals_of_the_verdict_are_not_broken_and_names_are_escaped():
    values = {"rope": (80.0, 82.0, 81.0), "a<b>": (60.0, 61.0, 63.0)}
    two = [row(word, 32, seed, top1) for word, found in values.items() for seed, top1 in enumerate(found)]
    text = page([Study("one", two, {})])
    verdict = text.partition('<section class="verdict">')[2].partition("</section>")[0]
    assert 'a&lt;b&gt; (19.7 points lower <span class="whole">[-5.2 to 44.5]</span>)' in verdict
    assert "a<b>" not in verdict


def test_the_tables_hold_every_number():
    losses, every = Reader(page([Study("one", rows(), {})])).tables
    sizes = ["32x48 (1.22x)", "48 (1.5x)", "64 (2x)", "96 (3x)", "128 (4x)"]
    assert losses[0] == ["mode", "encoding", "policy", *sizes]
    assert losses[1:3] == [
        ["scale", "rope", "extrapolate", "-3.0", "-10.0", "-20.0", "-30.0", "-40.0"],
        ["scale", "rope", "ntk", "-1.5", "-5.0", "-10.0", "-15.0", "-20.0"],
    ]
    assert losses[3][:2] == ["canvas", "a<b>&amp;"]
    assert len(every) == 1 + 3 * 6
    assert every[1] == ["scale", "rope", "extrapolate", "32", "81 ± 1", "0.19 ± 0.01"]


def test_entropy_and_distance_show_where_they_were_measured():
    found = rows()
    other = dict(top1=None, loss=None)  # rows of another metric are no accuracies
    found += [replace(row("rope", 64, s), metric="entropy", value=2.0 + s, **other) for s in (0, 1)]
    found += [replace(one, metric="distance", value=4.0, **other) for one in found[:3]]
    read = Reader(page([Study("one", found, {})]))
    assert [m["key"] for m in read.data["measures"]] == ["top1", "loss", "entropy", "distance"]
    (point,) = [p for s in read.data["series"] for p in s["points"] if "entropy" in p]
    assert point["entropy"][:3] == [2.5, pytest.approx(math.sqrt(0.5)), 2]
    assert point["top1"][2] == 3


def test_a_study_of_lengths_is_drawn_over_tokens():
    at = dict(train_height=1, train_width=64, height=1, mode="all tokens")
    lengths = [Row(encoding="rope", policy="ntk", seed=0, width=width, top1=50.0 - width / 64, loss=1.5, n=9,
                   metric="perplexity", value=4.5 + width / 64, **at) for width in (64, 128, 256)]  # fmt: skip
    read = Reader(page([Study("one", lengths, {})]))
    assert read.data["axis"] == "length [tokens]"
    assert [m["key"] for m in read.data["measures"]] == ["top1", "loss", "perplexity"]
    points = read.data["series"][0]["points"]
    assert [(p["x"], p["label"], p["perplexity"][0]) for p in points] == [
        (64, "64", 5.5),
        (128, "128", 6.5),
        (256, "256", 8.5),
    ]
    assert read.tables[0][1] == ["all tokens", "rope", "ntk", "-1.0", "-3.0"], "top-1 lost at 2 and 4 times the length"


def test_studies_of_two_training_sizes_meet_at_multiples():
    small = [row("rope", size, 0, 50.0, train=16) for size in (16, 32)]
    read = Reader(page([Study("big", rows(), {}), Study("same", small, {}), Study("same", small, {})]))
    assert read.data["studies"] == ["big", "same 1", "same 2"]
    assert read.data["train"] == [1.0]
    assert "size in training" in read.data["axis"]
    (one,) = [s for s in read.data["series"] if s["study"] == 1]
    assert [(p["x"], p["label"]) for p in one["points"]] == [(1.0, "1x"), (2.0, "2x")]
    assert read.tables[1][0][0] == "study"


def test_nothing_is_fetched_and_nothing_escapes():
    about = dict(command="vit2dpe study --root '</script><b>'", torch="2", config={"a": "<i>"})
    text = page([Study("</script>", rows(), about)])
    read = Reader(text)
    assert read.fetched == []
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2
    assert "{{" not in text
    assert len(read.ids) - read.ids.count(None) == len({i for i in read.ids if i})
    assert not read.opened
    for fact in ("vit2dpe study --root", "<dt>torch</dt><dd>2</dd>", "<dt>seeds</dt><dd>0, 1, 2</dd>", "settings"):
        assert fact in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_committed_results_have_a_page(path):
    study = read_study(path.parent)
    text = page([study])
    assert len(text) < 3_000_000
    read = Reader(text)
    words = list(dict.fromkeys(one["encoding"] for one in read_csv(path)))
    assert read.data["names"] == words
    assert study.about["torch"] in text


def test_the_command_merges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(path.parent) for path in RESULTS]
    assert main(["report", *runs, "--out", "sub/all.html"]) == 0
    assert Reader((tmp_path / "sub/all.html").read_text()).data["studies"] == [path.parent.name for path in RESULTS]
    assert main(["report", "nowhere"]) == 2
    assert "nowhere/results.csv" in capsys.readouterr().err
    for text, says in (("a,b\n1,2\n", "cannot be read|it has no encoding"), ("encoding,policy\n", "it has no rows")):
        (tmp_path / "results.csv").write_text(text)
        with pytest.raises(DataError, match=says):
            read_study(tmp_path)
    with pytest.raises(DataError, match="at least one"):
        merge([])


PROBE = """
<script>
const out = {errors: window.caught, lines: n("#top1 .line"), bands: n("#top1 .band")};
out.width = document.documentElement.scrollWidth;
function n(what) { return document.querySelectorAll(what).length; }
const names = document.querySelectorAll("#legend [data-name]");
names[0].click(); out.less = n("#top1 .line");
out.pressed = names[0].getAttribute("aria-pressed");
names[0].click(); out.again = n("#top1 .line");
names[1].dispatchEvent(new MouseEvent("click", {shiftKey: true})); out.alone = n("#top1 .line");
document.querySelector("#legend button:last-child").click(); out.all = n("#top1 .line");
const table = document.querySelectorAll("table.sortable")[1];
const column = () => [...table.tBodies[0].rows].map(r => +r.cells[4].dataset.value);
const heading = table.querySelectorAll("th button")[4];
heading.click(); out.down = column(); heading.click(); out.up = column();
const svg = document.querySelector("#top1 svg"); svg.focus();
for (const key of ["ArrowRight", "ArrowRight"]) svg.dispatchEvent(new KeyboardEvent("keydown", {key}));
out.tip = document.querySelector("#top1 .tip").textContent; out.said = document.getElementById("said").textContent;
svg.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"})); out.tips = n(".tip");
out.heat = n("#heatmap td");
out.policies = n("#policycharts .line"); out.resources = performance.getEntriesByType("resource").length;
document.body.replaceChildren(); document.body.append("PROBE" + JSON.stringify(out) + "PROBE");
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium is not in the PATH")
@pytest.mark.parametrize("width", [390, 1440])
def test_in_a_browser(width, tmp_path):
    """Opens from the disk without an error or a request; lines switch, the table sorts, the keyboard reads."""
    text = page([Study("one", rows(), {})])
    text = text.replace("<head>", "<head><script>caught = []; onerror = m => caught.push(String(m))</script>")
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE))
    options = ("headless", "no-sandbox", "disable-gpu", "dump-dom", "virtual-time-budget=3000")
    own = (f"window-size={width},900", f"user-data-dir={tmp_path / 'profile'}")
    command = [BROWSER, *(f"--{option}" for option in (*options, *own)), f"file://{tmp_path}/page.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(dom.split("PROBE")[-2].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert found["errors"] == []
    assert found["resources"] == 0
    assert (found["lines"], found["bands"]) == (3, 1)  # rope and its ntk in scale, in canvas one that has no deviation
    assert (found["less"], found["pressed"], found["again"], found["alone"], found["all"]) == (1, "false", 3, 1, 3)
    assert found["down"] == sorted(found["up"], reverse=True)
    assert found["up"] == sorted(found["up"])
    assert found["tip"].startswith("size 32x48")
    assert "rope 78.0% [75.5 to 80.5]" in found["said"]
    assert "rope · ntk 78.5% [" in found["said"]
    assert found["tips"] == 0
    assert found["policies"] == 2
    assert found["heat"] == 6, "of rope, at each size"
    assert found["width"] <= max(width, 500)  # a headless window may refuse to be narrower than 500
