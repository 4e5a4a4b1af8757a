"""RESULTS.md and the README's picture are what the committed csv files give, and the verdicts follow their rule."""

import itertools
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from recipes import claims
from vit2dpe.encodings import ENCODINGS
from vit2dpe.study.rows import Row, to_csv

ROOT = Path(__file__).parent.parent
BUILD = runpy.run_path(str(ROOT / "recipes" / "build_results.py"), run_name="build")
NOISE = (0.0, 0.4, -0.4, 0.2)  # by seed


def study(folder: Path, values: dict[str, float], seeds: int = 4, heat: float = 0.0, **policies: list[str]) -> Path:
    """A synthetic results.csv: an encoding has the same accuracy at all sizes, 20 more by its second policy."""
    rows = []
    for word, value in values.items():
        for more, policy in enumerate(policies.get(word, ["extrapolate"])):
            for temperature in ("none", "log"):
                for seed in range(seeds):
                    for side in (32, 64, 96, 128):
                        noise = NOISE[(seed + len(word)) % 4] * (side > 32)
                        top1 = value + noise + 20 * more + heat * (temperature == "log")
                        for mode, shown in (("scale", top1), ("canvas", 1.0)):  # claims are of the scale alone
                            trained = dict(encoding=word, seed=seed, train_height=32, train_width=32)
                            at = dict(policy=policy, temperature=temperature, mode=mode, height=side, width=side)
                            rows.append(Row(**trained, **at, top1=shown, loss=1.0, n=500, value=shown))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(to_csv(rows))
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": ",".join(values)}}))
    return folder


AS_CLAIMED = dict(alibi=50, lookhere=52, fire=51, rope=40, rope_mixed=43, rope_golden=41, learned=30) | dict(
    windowed=31, factorized=29, relative=28
)


def verdicts(folder: Path) -> list[str]:
    return [line.split("**")[1] for line in claims.claims(folder).splitlines() if line.startswith("- Claim")]


def test_the_page_is_what_the_csv_files_give():
    text = BUILD["PAGE"].read_text()
    assert text == BUILD["page"](text), "run: python recipes/build_results.py"
    named = {match.group(3) for match in BUILD["BLOCK"].finditer(text) if match.group(2) != "bench"}
    kept = {path.parent.name for path in BUILD["RESULTS"].glob("*/*.csv")}
    assert named == kept, "every folder of recipes/results has a block `<!-- table: NAME -->` in RESULTS.md"


def test_the_readmes_picture_was_drawn_from_the_committed_study():
    assert Image.open(BUILD["PICTURE"]).text["Source"] == BUILD["digest"](), "run: python recipes/build_results.py"


def test_several_seeds_are_told_with_their_interval(tmp_path):
    said = BUILD["table"](study(tmp_path, dict(rope=40.0), seeds=2))
    # Seeds at 40.0 and 40.4: half of the interval is t(0.975, 1) * s / sqrt(2) = 12.706 * 0.2828 / 1.4142 = 2.54.
    values = [NOISE[(seed + len("rope")) % 4] for seed in range(2)]
    assert values == [0.0, 0.4]
    assert "| rope | extrapolate | none | 40.0 ± 0.0 | 40.2 ± 2.5 | 40.2 ± 2.5 | 40.2 ± 2.5 |" in said
    assert said.startswith("1 encoding, 2 seeds, 500 test samples; mean ± half of a 95% t-interval over the seeds.")


def test_what_is_not_finished_is_said(tmp_path):
    folder = study(tmp_path, dict(rope=40, alibi=50), seeds=2)
    rows = (folder / "results.csv").read_text().splitlines(True)
    rows = [line for line in rows if not (line.startswith("alibi") and line.split(",")[4] == "1")]
    (folder / "results.csv").write_text("".join(rows))
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": "rope,alibi,fire"}}))
    assert "Fewer seeds: `alibi` has 1. Not finished: `fire`." in BUILD["table"](folder)


def test_all_is_every_encoding_there_is(tmp_path):
    every = dict.fromkeys(ENCODINGS, 40.0)
    folder = study(tmp_path, every, seeds=1)
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": "all"}}))
    assert BUILD["table"](folder).startswith(f"{len(every)} encodings, 1 seed, 500 test samples.\n")
    study(tmp_path, {word: 40.0 for word in every if word != "fire"}, seeds=1)
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": "all"}}))
    assert "Not finished: `fire`." in BUILD["table"](folder)


def test_options_of_a_planned_encoding_are_one_word_with_it(tmp_path):
    folder = study(tmp_path, {"rope(base=10, ndim=2)": 40.0}, seeds=1)
    assert "Not finished" not in BUILD["table"](folder)


def test_two_models_are_compared_with_an_interval(tmp_path):
    """Two-sample t by scipy: the interval of the difference is where its p-value is 5%."""
    from scipy.stats import ttest_ind

    a, b = [20.0, 21.0, 22.5], [19.0, 21.5]
    mean, half = BUILD["difference"](a, b)
    assert mean == pytest.approx(sum(a) / 3 - sum(b) / 2)
    interval = ttest_ind(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    more = "epochs,updates,train_loss,test_top5,test_loss,cpu_s"
    rows = [f"vit2dpe,{i},{v},2,6,3.5,50,3.25,100" for i, v in enumerate(a)]
    rows += [f"timm,{i},{v},2,6,3,40,3,90" for i, v in enumerate(b)]
    (tmp_path / "against.csv").write_text("\n".join([f"model,seed,test_top1,{more}", *rows]) + "\n")
    said = BUILD["table"](tmp_path)
    assert "| vit2dpe | 3 | 21.17 | 20.00, 21.00, 22.50 | 50.00 | 3.250 | 3.500 | 100 |" in said
    assert "| timm | 2 | 20.25 | 19.00, 21.50 | 40.00 | 3.000 | 3.000 | 90 |" in said
    assert f"vit2dpe − timm: +0.92 points of top-1, 95% interval {mean - half:+.2f} to {mean + half:+.2f}" in said
    (tmp_path / "against.csv").write_text("\n".join([f"model,seed,test_top1,{more}", rows[0], rows[-1]]) + "\n")
    assert "vit2dpe − timm: -1.50 points of top-1; one seed each gives no interval." in BUILD["table"](tmp_path)


def test_an_exchange_is_told_with_a_paired_interval_over_seeds(tmp_path):
    """The mean of the differences, seed by seed, which vary less than the models do."""
    rows = [f"cifar,rope,{seed},350,7038,1,1000,{80 + seed},20,{79.5 + seed + seed / 5}" for seed in range(3)]
    rows += [f"cifar,rope,{seed},350,7038,2.0,1000,50,30,70" for seed in range(3)]
    head = "model,to,seed,updates,trained,by,n,old,swapped,recovered"
    (tmp_path / "swap.csv").write_text("\n".join([head, *rows]) + "\n")
    said = BUILD["table"](tmp_path).splitlines()
    half = 4.30265 * 0.2 / 3**0.5
    wanted = (
        f"| cifar | `rope` | 1 | 3 | 81.00 | 20.00 | 80.70 | -0.30 | {-0.3 - half:+.2f} to {-0.3 + half:+.2f} | 1000 |"
    )
    assert said[2] == wanted
    half = 4.30265 * 0.1 / 3**0.5  # equal differences are believed up to an image
    assert f"| +20.00 | {20 - half:+.2f} to {20 + half:+.2f} |" in said[3]


def test_verdicts(tmp_path):
    assert verdicts(study(tmp_path / "a", AS_CLAIMED, heat=1.0)) == ["confirmed"] * 3
    assert verdicts(study(tmp_path / "b", AS_CLAIMED | dict(lookhere=20, alibi=20, fire=20), heat=-1.0)) == [
        "refuted",
        "confirmed",
        "refuted",
    ]
    assert verdicts(study(tmp_path / "c", AS_CLAIMED | dict(rope_mixed=40.1), heat=1.0))[1] == "undecided"
    assert verdicts(study(tmp_path / "d", AS_CLAIMED, seeds=1, heat=1.0)) == ["undecided"] * 3
    without = {word: value for word, value in AS_CLAIMED.items() if word != "rope_mixed"}
    said = claims.claims(study(tmp_path / "e", without, heat=1.0))
    assert "Claim 1 is **undecided**: `rope_mixed` not finished." in said
    assert "Claim 3 is **confirmed**." in said


def test_the_rule_of_a_verdict():
    """Every difference counts, and one that cannot be judged leaves the claim undecided."""
    verdict, one = claims.verdict, claims.Difference
    above, below, around = [1.0, 1.2, 1.1], [-1.0, -1.2, -1.1], [-1.0, 1.0, 0.1]

    def judged(*differences):
        return verdict([one("", 2.0, by_seed) for by_seed in differences]).partition(":")[0]

    assert judged(above) == judged(above, above) == judged([0.0, 0.0], above) == "confirmed"
    assert judged(above, below) == judged(around, below) == "refuted"
    assert judged(above, around) == "undecided"
    assert judged(above, [1.0]) == judged(above, []) == judged() == "undecided"


def places(folder: Path, lift: dict[str, float], part: float = 0.0) -> Path:
    """A synthetic study of places: `lift` is what jitter gives each encoding beyond the training size."""
    rows, ways = [], [(word, way) for word in lift for way in ("plain", "jitter")]
    for word, training in [*ways, ("learned", "subtable")]:
        for mode, side, seed in itertools.product(("scale", "canvas"), (16, 24, 32, 48), range(4)):
            part_of, top1 = training == "subtable", 50.0 + 5 * seed
            if part_of and side > 32:
                continue  # above its table
            top1 += NOISE[seed] * (training != "plain") + part * (part_of and mode == "canvas")
            top1 += lift[word] * (training == "jitter" and side > 16)
            at = dict(mode=mode, seed=seed, train_height=16, train_width=16, height=side, width=side)
            policy = "subtable" if part_of else "interpolate"
            rows.append(Row(encoding=word, training=training, policy=policy, **at, top1=top1, n=360, value=top1))
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text(to_csv(rows))
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": ",".join(lift)}}))
    return folder


def test_claims_about_places_are_of_differences_seed_by_seed(tmp_path):
    name = "study_places_digits"
    true = places(tmp_path / "a" / name, dict(learned=8.0, relative=2.0, rope=1.0), part=3.0)
    assert verdicts(true) == ["confirmed"] * 5
    lines = claims.claims(true).splitlines()
    assert "| 1 | `learned, jitter` − `learned` | 2x | +8.0 | +7.5 to +8.6 | 4 |" in lines
    assert "| 2 | (`learned, jitter` − `learned`) − (`rope, jitter` − `rope`) | 3x | +7.0 | +7.0 to +7.0 | 4 |" in lines
    assert "| 3 | `rope, jitter` − `rope` + 1 | 1x | +1.1 | +0.5 to +1.6 | 4 |" in lines
    assert [line.split("|")[3].strip() for line in lines if line.startswith("| 5")] == ["1.5x", "2x"]
    false = places(tmp_path / "b" / name, dict(learned=-2.0, relative=0.0, rope=1.0), part=-1.0)
    assert verdicts(false) == ["refuted", "refuted", "confirmed", "undecided", "refuted"]
    said = claims.claims(places(tmp_path / "c" / name, dict(learned=8.0, rope=1.0)))
    assert "Claim 4 is **undecided**: `relative`, `relative, jitter` not finished." in said
    (line,) = (line for line in BUILD["table"](true).splitlines() if line.startswith("| canvas | learned, subtable"))
    assert line.endswith("| - |"), "a table has no larger size of its own"


def test_claims_are_of_sizes_beyond_training(tmp_path):
    lines = claims.claims(study(tmp_path, AS_CLAIMED)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    at = {number: [cell[2] for cell in cells if cell[0] == number] for number in "123"}
    assert at == {"1": ["2x", "3x", "2x", "3x"], "2": ["2x", "3x", "4x"], "3": ["3x", "4x"]}
    assert {cell[1] for cell in cells if cell[0] == "3"} == {f"with − without, mean of {len(AS_CLAIMED)}"}


@pytest.mark.parametrize("policies", [["extrapolate", "interpolate"], ["interpolate", "extrapolate"]])
def test_a_family_is_judged_by_its_default_policy(tmp_path, policies):
    folder = study(tmp_path, AS_CLAIMED, alibi=policies)  # 50 by the first and 70 by the second; lookhere has 52
    assert "distance biases (`lookhere`)" in claims.claims(folder)
