"""RESULTS.md and the README's picture are what the committed csv files give, and the verdicts follow their rule."""

import json
import runpy
from pathlib import Path

from PIL import Image

from vit2dpe.encodings import ENCODINGS
from vit2dpe.train.study import to_csv

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
                        rows.append(
                            dict(encoding=word, policy=policy, temperature=temperature, mode="scale", seed=seed)
                            | dict(train_height=32, train_width=32, height=side, width=side)
                            | dict(top1=top1, loss=1.0, n=500, metric="top1", value=top1)
                        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(to_csv(rows))
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": ",".join(values)}}))
    return folder


AS_CLAIMED = dict(alibi=50, lookhere=52, fire=51, rope=40, rope_mixed=43, rope_golden=41, learned=30) | dict(
    windowed=31, factorized=29, relative=28
)


def verdicts(folder: Path) -> list[str]:
    return [line.split("**")[1] for line in BUILD["claims"](folder).splitlines() if line.startswith("- Claim")]


def test_the_page_is_what_the_csv_files_give():
    text = BUILD["PAGE"].read_text()
    assert text == BUILD["page"](text), "run: python recipes/build_results.py"
    named = {match.group(3) for match in BUILD["BLOCK"].finditer(text)}
    kept = {path.parent.name for path in BUILD["RESULTS"].glob("*/*.csv")}
    assert named == kept, "every folder of recipes/results has a block `<!-- table: NAME -->` in RESULTS.md"


def test_the_readmes_picture_was_drawn_from_the_committed_study():
    assert Image.open(BUILD["PICTURE"]).text["Source"] == BUILD["digest"](), "run: python recipes/build_results.py"


def test_a_study_of_all_encodings_tells_which_are_missing(tmp_path):
    folder = study(tmp_path, dict.fromkeys(ENCODINGS, 40.0), seeds=1)
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": "all"}}))
    assert "Not finished" not in BUILD["table"](folder)
    study(folder, dict.fromkeys(list(ENCODINGS)[:-1], 40.0), seeds=1)
    (folder / "env.json").write_text(json.dumps({"config": {"encodings": "all"}}))
    assert f"Not finished: `{list(ENCODINGS)[-1]}`." in BUILD["table"](folder)


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
    said = BUILD["claims"](study(tmp_path / "e", without, heat=1.0))
    assert "Claim 1 is **undecided**: `rope_mixed` not finished." in said
    assert "Claim 3 is **confirmed**." in said


def test_a_family_is_judged_by_its_default_policy(tmp_path):
    folder = study(tmp_path, AS_CLAIMED, alibi=["extrapolate", "interpolate"])  # 50 and 70; lookhere has 52
    assert "distance biases (`lookhere`)" in BUILD["claims"](folder)
