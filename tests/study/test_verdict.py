"""The verdict of a study: its sentences on rows whose answer is known, and on what older folders keep."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.study.test_html import row
from vit2dpe.cli import main
from vit2dpe.cli.options import settings
from vit2dpe.study import StudyConfig, read_rows, trials
from vit2dpe.study.compare import compare
from vit2dpe.study.html import page, read_study
from vit2dpe.study.own_folder import own_folder
from vit2dpe.study.plan import check
from vit2dpe.study.rows import Row
from vit2dpe.study.run import prepare
from vit2dpe.study.tables import FIT, MAJORITY
from vit2dpe.study.verdict import verdict

GOLDEN = Path(__file__).parents[1] / "golden" / "study"
N = 400


def answers(right, n=N, first=0):
    """The first `right` images of n, beginning at another one."""
    found = torch.zeros(n, dtype=torch.bool)
    found[first : first + right] = True
    return found


def measured(word, right, size=32, seed=0, *, policy="extrapolate", mode="scale", first=0):
    """A row and its answers."""
    one = row(word, size, seed, 100 * right / N, policy=policy, mode=mode)
    return one.__class__(**{name: getattr(one, name) for name in one.__slots__} | {"n": float(N)}), answers(
        right, first=first
    )


def told(*found, about=None):
    rows, right = zip(*found, strict=True)
    return verdict(list(rows), list(right), about)


def test_who_leads_and_who_cannot_be_told_apart():
    """At 32 rope and sincos differ in 4 images, from none in 100; at 64 rope alone is best, with its other policy."""
    said = told(
        measured("none", 220), measured("rope", 320), measured("rope", 320, policy="ntk"), measured("sincos", 316),
        measured("none", 100, 64), measured("rope", 80, 64), measured("rope", 300, 64, policy="ntk"),
        measured("sincos", 200, 64), about={"command": "vit2dpe study --out here", MAJORITY: 10.0},
    )  # fmt: skip
    assert said.short == ["rope leads at 64; at 32 (training) no single best one can be named."]
    ((heading, (first, second)),) = said.parts
    assert heading == "scale, the same picture with more pixels:"
    assert first.startswith("At 32 (training) rope has 80.0% and cannot be told apart from sincos (1.0 points lower [-")
    assert '); clearly behind: "none" by 25.0 points [' in first
    assert second.startswith("At 64 rope (ntk) leads with 75.0%; behind it: sincos by 25.0 points [")
    text = said.text()
    assert "on 400 test images, 1 seed." in text
    assert "Naming the most frequent class is right for 10.0%." in text
    assert "With one seed they say nothing about another training." in text
    assert text.endswith("vit2dpe study --out here --seeds 3")
    assert said.markdown().startswith("## The verdict\n\n**rope leads at 64")


def test_pairs_decide_not_counts():
    """Equal counts, 20 images apart: told apart where all 20 are among the images that the other has wrong, and not
    where 120 images differ either way."""
    nested, crossed = measured("sincos", 300), measured("sincos", 300, first=70)
    assert len(compare([measured("rope", 320)[0], nested[0]], [answers(320), nested[1]])[0].group) == 1
    assert len(compare([measured("rope", 320)[0], crossed[0]], [answers(320), crossed[1]])[0].group) == 2


def test_policies_that_answer_alike_are_one_comparison():
    found = [
        measured("none", 200),
        *(measured("rope", 300, policy=policy) for policy in ("extrapolate", "ntk", "yarn")),
    ]
    rows, right = zip(*found, strict=True)
    (place,) = compare(rows, right)
    assert (place.comparisons, place.leader.label) == (1, "rope")
    (alone,) = compare(rows[1:], [answers(300), answers(290), answers(200)])
    assert [line.label for line in alone.group] == ["extrapolate"], "the policies of a single encoding are compared"


def test_several_seeds_are_paired():
    """Rope is 10 points above none in each of three seeds, which differ from each other by more."""
    found = [measured(word, right + shift, seed=seed) for seed, shift in enumerate((0, 40, 80)) for word, right in
             (("none", 200), ("rope", 240), ("sincos", 238 - shift // 4))]  # fmt: skip
    said = told(*found)
    ((_, (sentence,)),) = said.parts
    assert sentence.startswith("At 32 (training) rope has 70.0% and cannot be told apart from sincos (")
    assert '; clearly behind: "none" by 10.0 points [' in sentence
    assert any("t intervals of the differences to the leader over 3 seeds" in basis for basis in said.basis)
    assert "--seeds" in said.next
    unfinished = told(*found[:-1])
    assert any("over 2 seeds" in basis for basis in unfinished.basis), "those that all of them have"


def test_the_truly_best_is_in_the_leading_group():
    """In 80 simulated studies of six models, two of them equally good, by one seed over 200 images."""
    kept = 0
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        share = torch.tensor([0.8, 0.8, 0.78, 0.7, 0.7, 0.4])[:, None]
        right = torch.rand(6, 200, generator=generator) < share
        rows = [row(f"m{i}", 32, 0, 100 * float(one.float().mean())) for i, one in enumerate(right)]
        kept += {"m0", "m1"} <= {line.name for line in compare(rows, list(right))[0].group}
    assert kept >= 0.94 * 80


@pytest.mark.parametrize(("none", "rope"), [(40, 48), (40, 200)])
def test_below_the_most_frequent_class_nothing_was_learned(none, rope):
    about = {"command": "vit2dpe study --epochs=2 --root a", MAJORITY: 12.5, "config": {"optim": {"epochs": 2}}}
    said = told(measured("none", none), measured("rope", rope), about=about)
    if rope == 48:
        assert said.short == [
            "Nothing has been learned yet: at the training size no model is above naming the most frequent class "
            "(12.5%), so the differences below mean nothing."
        ]
        assert said.next == "vit2dpe study --root a --epochs 6"
    else:
        assert 'so nothing was learned with: "none".' in said.short[0]
        assert said.short[1] == "rope leads at 32 (training)."
        assert said.next.endswith("--seeds 3")


def test_how_photos_were_cut_is_said():
    found = measured("none", 200), measured("rope", 300)
    assert "the middle of their longer side (data.fit crop)" in told(*found, about={FIT: "crop"}).text()
    assert "data.fit" not in told(*found).text()


def length(word, value, seed, width=64, metric="perplexity"):
    return Row(encoding=word, policy="default", mode="all tokens", seed=seed, train_height=1, train_width=64, height=1,
               width=width, top1=20.0, loss=1.5, n=5000, metric=metric, value=value)  # fmt: skip


def test_lower_perplexity_is_better_and_one_seed_has_no_interval():
    once = verdict([length("rope", 5.0, 0), length("none", 6.0, 0)])
    assert 'At 64 (training) rope is first with perplexity 5.00; behind it: "none" by 1.00.' in once.text()
    assert "With one seed no interval can be given for perplexity: it takes several seeds." in once.text()
    often = verdict([length(w, v + s / 10, s) for s in range(4) for w, v in (("rope", 5.0), ("none", 6.0 + s / 50))])
    assert 'At 64 (training) rope leads with perplexity 5.15; behind it: "none" by 1.03 [' in often.text()
    assert verdict([]) is None
    assert "nothing can be compared" in verdict([length("rope", float("nan"), 0)]).text()


@pytest.mark.parametrize("task", ["images", "reverse"])
def test_folders_of_the_first_version_say_that_no_interval_can_be_given(task):
    found = read_study(GOLDEN / task)
    said = found.verdict.text()
    assert "No interval can be given: which images each model had right was not kept." in said
    first = {
        "images": "first: default at 16 (training) and default at 24x32; without",
        "reverse": "At 8 extrapolate is first with 0.0%",
    }
    assert first[task] in said
    assert "The verdict" in page([found])


MICRO = ["--encodings", "none,rope", "--sizes", "16,20", "--modes", "scale", "--epochs", "1", "--limit-train", "64",
         "--limit-test", "40", "--width", "16", "--depth", "1", "--heads", "2", "--batch-size", "32", "--jobs", "1",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("verdict") / "study"
    assert main(["study", *MICRO, "--out", str(out)]) == 0
    return out


def test_a_study_ends_with_it_and_its_files_open_with_it(finished, capsys, tmp_path):
    assert main(["study", *MICRO, "--out", str(finished)]) == 0
    screen = capsys.readouterr().out
    found = read_study(finished)
    text = found.verdict.text()
    assert text in screen
    assert "paired bootstrap draws of the test images" in text
    assert (finished / "summary.md").read_text().index("## The verdict") < 40
    html = (finished / "report.html").read_text()
    assert html.index("The verdict") < html.index('id="legend"')
    assert main(["report", str(finished), "--out", str(tmp_path / "page.html")]) == 0
    assert text in capsys.readouterr().out
    right = found.answers
    assert [100 * float(one.float().mean()) for one in right] == [pytest.approx(one.value) for one in found.rows]


def test_answers_are_resumed_with_their_rows(finished, tmp_path, monkeypatch):
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    monkeypatch.setattr(trials, "fit", None)
    before = (out / "answers.safetensors").read_bytes()
    (out / "answers.safetensors").unlink()
    assert main(["study", *MICRO, "--out", str(out)]) == 0
    assert (out / "answers.safetensors").read_bytes() == before
    for path in out.glob("cells/*/answers-*"):  # as an older version left it
        path.unlink()
    (out / "answers.safetensors").unlink()
    assert main(["study", *MICRO, "--out", str(out)]) == 0
    assert "No interval can be given" in read_study(out).verdict.text()
    for path in out.glob("cells/*/sweep-*"):
        path.unlink()
    assert main(["study", *MICRO, "--out", str(out)]) == 0
    assert "No interval can be given" not in read_study(out).verdict.text(), "as the sentence promised"


def test_another_study_goes_to_a_folder_of_its_own(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    longer = ["study", *MICRO, "--out", str(out), "--lr", "0.001"]
    assert main(longer) == 0
    said = capsys.readouterr().out
    other = tmp_path / "study-2"
    assert (
        f"note: {out} holds the results of another study (optim.lr 0.003, here 0.001); those of this one go to {other}"
        in said
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(trials, "fit", None)
    assert main(longer) == 0, "the same command finds its folder again"
    assert not (tmp_path / "study-3").exists()
    capsys.readouterr()
    assert main(["study", *MICRO, "--out", str(out), "--encodings", "rope", "--sizes", "16"]) == 0
    assert "note: results.csv will be without none, which" in capsys.readouterr().out
    assert {one.encoding for one in read_rows(out / "results.csv")} == {"rope"}, "a selection of the same study"


def test_another_depth_is_another_study(finished):
    """Rows of one depth do not say which; several depths name theirs."""

    def folder(*words):
        config = settings("study", StudyConfig, [*MICRO, "--out", str(finished), *words])
        return own_folder(prepare(check(config)))[0]

    assert folder() == folder("--depths", "1,2") == folder("--seeds", "3", "--sizes", "24") == finished
    assert folder("--depth", "2") == folder("--epochs", "2") == finished.with_name("study-2")


def test_quick_measures_every_policy_of_an_encoding():
    assert StudyConfig.of(quick=True).policies == ("all",)


def test_shares_are_drawn_from_0_to_100():
    from vit2dpe.study.report import draw

    rows = [measured(word, right, size)[0] for word, right in (("none", 380), ("rope", 390)) for size in (32, 64)]
    figure = draw(rows)
    low, high = figure.axes[0].get_ylim()
    assert low <= 0
    assert high >= 100
    assert len(figure.axes[0].collections) == 2, "a band of an interval over images, of one seed"
