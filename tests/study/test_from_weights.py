"""`study --init`: every encoding starts from the same weights, and a control shows what they brought."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.data.pictures import photos
from tests.helpers import read_csv, shaken
from vit2dpe import ViT
from vit2dpe.cli import main
from vit2dpe.errors import ConfigError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.resolution.apply import policies_of
from vit2dpe.study import settle as settling
from vit2dpe.study import trials
from vit2dpe.study.brought import brought
from vit2dpe.study.from_weights import at_hand, words_for
from vit2dpe.study.rows import SCRATCH, WEIGHTS, Row, read_rows, to_csv
from vit2dpe.study.settings import StudyConfig
from vit2dpe.study.settle import settle
from vit2dpe.study.verdict import verdict
from vit2dpe.training.checkpoint import load_run, read_meta, save_model, write_policy
from vit2dpe.training.start import describe

SIZES = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, mlp_ratio=3.0)
ABOUT = dict(classes=list("vwxyz"), mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])


def weights(folder: Path, position: str = "learned", seed: int = 0) -> Path:
    """The run folder of a model that was trained on other classes."""
    torch.manual_seed(seed)
    arguments = dict(SIZES, position=position, class_token=False, global_pool="avg")
    save_model(folder / "last", shaken(ViT(**arguments), seed=None), arguments, **ABOUT)
    return folder


class Begun(dict[str, tuple[dict[str, Tensor], object]]):
    """State and optimizer of every training at its start, by encoding."""


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    """Trainings that end before their first step."""
    found = Begun()

    def train(
        model: nn.Module, measure: trials.Measure, seed: int, optim: object, folder: Path, progress: object
    ) -> dict[str, float]:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        assert folder.name not in found, "trained twice"
        found[folder.name.partition("-seed")[0]] = state, optim
        return {"train_loss": 1.0}

    monkeypatch.setattr(trials, "train", train)
    return found


@pytest.fixture
def mine(tmp_path: Path, cache: Path) -> Path:
    return photos(tmp_path / "photos")


def study(mine: Path, out: Path, init: Path | str, *words: object) -> int:
    fixed = ["--jobs", "1", "--modes", "scale", "--device", "cpu", "--policies", "default", "--threads", "1"]
    return main(["study", "--root", str(mine), "--out", str(out), "--init", str(init), *fixed, *map(str, words)])


def test_every_training_starts_from_the_weights_and_the_control_does_not(
    tmp_path: Path, mine: Path, begun: Begun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = weights(tmp_path / "run"), tmp_path / "out"
    assert study(mine, out, run, "--encodings", "keep,rope,keep+alibi") == 0
    said = capsys.readouterr().out
    assert set(begun) == {"learned", "rope", "learned+alibi", "learned-scratch"}
    own = load_run(run).state_dict()
    for name in ("learned", "rope", "learned+alibi"):
        state, optim = begun[name]
        taken = {key for key in state if key in own and torch.equal(state[key], own[key])}
        assert set(state) - taken == {key for key in state if key.startswith("head.") or key not in own}, name
        assert (optim.lr, optim.layer_decay, optim.epochs, optim.warmup_epochs) == (3e-4, 0.75, 30, 3)
    assert "position.pos_embed" not in begun["rope"][0]
    state, optim = begun["learned-scratch"]
    assert not any(torch.equal(state[key], own[key]) for key in state if key.endswith("weight") and "norm" not in key)
    assert (optim.lr, optim.layer_decay, optim.epochs, optim.freeze) == (3e-4, 1.0, 30, 0)
    rows = read_rows(out / "results.csv")
    assert [(row.encoding, row.start) for row in rows[::4]] == [
        ("learned", WEIGHTS), ("rope", WEIGHTS), ("learned+alibi", WEIGHTS), ("learned", SCRATCH)
    ]  # fmt: skip
    assert list(read_csv(out / "results.csv")[0])[-1] == "start"
    assert {row.train_size for row in rows} == {(16, 24)}, "the size of the weights"
    assert [row.size for row in rows[:4]] == [(16, 24), (24, 32), (32, 48), (48, 72)], "1, 1.5, 2 and 3 times"
    cells = {path.name.partition("-seed")[0]: read_meta(path / "last") for path in (out / "cells").iterdir()}
    trained = {name: meta["trained"] for name, meta in cells.items()}
    assert {name: "init" in one for name, one in trained.items()} == {name: "scratch" not in name for name in begun}
    assert all(meta["mean"] == ABOUT["mean"] and meta["std"] == ABOUT["std"] for meta in cells.values())
    assert all(meta["arguments"]["mlp_ratio"] == 3 and meta["arguments"]["num_classes"] == 3 for meta in cells.values())
    assert "learned, from scratch" in said
    assert "What the weights brought" in said
    assert f"Every encoding started from {run}" in (out / "summary.md").read_text()
    assert "What the weights brought" in (out / "report.html").read_text()
    assert f"--init {run}" in said.partition("another training would change: ")[2] or "To train longer" in said


def test_a_stopped_study_goes_on_and_other_weights_make_another_one(
    tmp_path: Path, mine: Path, begun: Begun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = weights(tmp_path / "run"), tmp_path / "out"
    assert study(mine, out, run, "--encodings", "keep", "--scratch", "false", "--sizes", "16x24") == 0
    assert set(begun) == {"learned"}
    before = (out / "results.csv").read_bytes()
    assert study(mine, out, run, "--encodings", "keep,none", "--sizes", "16x24") == 0
    assert "finished before" in capsys.readouterr().out
    assert set(begun) == {"learned", "none", "learned-scratch"}
    assert (out / "results.csv").read_bytes().startswith(before)
    begun.clear()
    weights(run, seed=1)  # other weights at the same place
    assert study(mine, out, run, "--encodings", "keep", "--scratch", "false", "--sizes", "16x24") == 0
    assert set(begun) == {"learned"}
    assert "holds the results of another study" in capsys.readouterr().out
    assert (out.with_name("out-2") / "results.csv").is_file()
    assert len(read_rows(out / "results.csv")) == 3


def test_it_trains_and_in_other_processes_too(tmp_path: Path, mine: Path) -> None:
    plan = settle(StudyConfig.of(root=str(mine), init=str(weights(tmp_path / "run")), out=str(tmp_path / "out")))
    again = pickle.loads(pickle.dumps(plan))
    assert again.trials == plan.trials
    for trial in plan.trials:
        assert again.model_spec(trial, 3) == plan.model_spec(trial, 3)
    assert [trial.encoding for trial in plan.trials] == ["learned", "none", "rope", "relative", "learned"]
    assert plan.config.encodings == ("learned", "none", "rope", "relative")
    more = ["--encodings", "keep", "--epochs", "1", "--sizes", "16x24", "--seeds", "2", "--model.drop_path", "0.1"]
    assert study(mine, tmp_path / "out", tmp_path / "run", *more) == 0
    rows = read_rows(tmp_path / "out" / "results.csv")
    assert [(row.seed, row.start) for row in rows] == [(0, WEIGHTS), (0, SCRATCH), (1, WEIGHTS), (1, SCRATCH)]
    found = brought(rows)
    assert (found[0].seeds, len(found)) == (2, 1)
    values = [row.value for row in rows]
    assert found[0].by == pytest.approx((values[0] + values[2] - values[1] - values[3]) / 2)


@pytest.mark.slow
def test_spawned_jobs(tmp_path: Path, mine: Path) -> None:
    run = weights(tmp_path / "run")
    words = ["--epochs", "1", "--encodings", "keep,rope", "--sizes", "16x24"]
    assert study(mine, tmp_path / "one", run, *words) == 0
    assert study(mine, tmp_path / "two", run, *words, "--jobs", "2") == 0
    assert (tmp_path / "one/results.csv").read_bytes() == (tmp_path / "two/results.csv").read_bytes()


def test_the_size_of_the_weights_unless_time_is_short(
    tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = dict(SIZES, img_size=(64, 96), position="learned", class_token=False, global_pool="avg")
    save_model(tmp_path / "run" / "last", ViT(**arguments), arguments)
    config = StudyConfig.of(root=str(mine), init=str(tmp_path / "run"), out=str(tmp_path / "out"), encodings="keep")
    monkeypatch.setattr(settling, "estimate", lambda plan, *_: plan.train_size[0] * plan.train_size[1] / 300)
    assert settle(config).train_size == (48, 48)
    said = capsys.readouterr().out
    assert (
        "trained at 48, about 7.7 minutes in all: the largest size that fits into --minutes 10; 64x96, the size of"
        in said
    )
    assert "would take about 20" in said
    assert settle(config).train_size == (48, 48)
    assert "as before" in capsys.readouterr().out
    free = StudyConfig.of(root=str(mine), init=str(tmp_path / "run"), out=str(tmp_path / "b"), minutes=60)
    assert settle(free).train_size == (64, 96)
    chosen = settle(StudyConfig.of(root=str(mine), init=str(tmp_path / "run"), train_size="32x48"))
    assert (chosen.train_size, chosen.sizes) == ((32, 48), ((32, 48), (48, 72), (64, 96), (96, 144)))
    assert chosen.model_spec(chosen.trials[0], 3).arguments["img_size"] == [32, 48]
    named = settle(StudyConfig.of(data="digits", init=str(tmp_path / "run")))
    assert named.train_size == (64, 96)


def test_settings_of_the_model_change_it(tmp_path: Path, mine: Path) -> None:
    run = str(weights(tmp_path / "run"))
    plan = settle(StudyConfig.of(root=str(mine), init=run, mlp_ratio=1.5, encodings="keep"))
    assert plan.model_spec(plan.trials[0], 3).arguments["mlp_ratio"] == 1.5
    assert plan.config.model.width == 48
    again = settle(StudyConfig.of(root=str(mine), init=run, width=48, encodings="keep"))
    assert again.model_spec(again.trials[0], 3).arguments["mlp_ratio"] == 3


def test_a_policy_that_was_tuned_is_measured_for_the_encoding_of_the_weights(tmp_path: Path) -> None:
    run = weights(tmp_path / "run", "rope")
    write_policy(run / "last", "interpolate(power=0.5)", "log(power=4)")
    plan = settle(StudyConfig.of(data="digits", init=str(run), encodings="keep,learned"))
    found = {}
    for trial in plan.trials:
        model = plan.model_spec(trial, 3).build()
        found[trial.encoding, trial.start] = tuple(trials.policies_for(plan, model))
    able = policies_of(load_run(run))
    control = ("default", *able)
    assert found == {
        ("rope", WEIGHTS): control,
        ("learned", WEIGHTS): ("resize", "interpolate"),
        ("rope", SCRATCH): control,
    }


def test_words_mean_the_encoding_of_the_weights(tmp_path: Path) -> None:
    learned, rope = describe(weights(tmp_path / "a")), describe(weights(tmp_path / "b", "rope(base=10)"))
    assert words_for(("keep", "none", "learned"), learned) == ("learned", "none")
    assert words_for(("keep+rope", "alibi+keep", "rope"), learned) == ("learned+rope", "alibi+learned", "rope")
    assert words_for(("keep", "rope"), rope) == ("rope(base=10)",), "options that a word does not name are theirs"
    assert words_for(("keep", "rope(base=7)"), rope) == ("rope(base=10)", "rope(base=7)")
    assert words_for(None, rope) == ("rope(base=10)", "none", "learned", "relative")
    welded = describe("resnet18")
    assert words_for(None, welded) == ("keep",)
    with pytest.raises(ConfigError, match=r"resnet18|ResNet"):
        words_for(("rope",), welded)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--init", "vit_tinny_patch16_224"], "vit_tinny_patch16_224"),
        (["--init", "./nowhere"], "there is nothing at ./nowhere"),
        (["--init", "{run}", "--depths", "1,2"], "the architecture comes with the weights"),
        (["--init", "{run}", "--arch", "swin"], "the architecture comes with the weights"),
        (["--init", "{run}", "--encodings", "keep,roppe"], "roppe"),
        (["--init", "{file}"], "there is no model.json and no config.json beside it"),
        (["--encodings", "keep"], "keep is the encoding of weights to start from"),
        (["--init", "{run}", "--train_size", "20"], "20"),
    ],
)
def test_what_cannot_be_started_from_is_refused_at_once(
    words: list[str], said: str, tmp_path: Path, mine: Path, begun: Begun, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = weights(tmp_path / "run"), tmp_path / "weights.safetensors"
    file.write_bytes((run / "last" / "model.safetensors").read_bytes())
    words = [word.format(run=run, file=file) for word in words]
    assert main(["study", "--root", str(mine), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not begun


def test_other_tasks_have_no_use_for_weights_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--task", "copy", "--init", "x"]) == 2
    assert "task copy has no use for init" in capsys.readouterr().err


def row(value: float, start: str, seed: int = 0, size: int = 32, encoding: str = "learned") -> Row:
    at = dict(train_height=32, train_width=32, height=size, width=size)
    return Row(
        encoding=encoding, policy="resize", mode="scale", seed=seed, value=value, top1=value, n=50, start=start, **at
    )


def test_what_the_weights_brought_by_hand() -> None:
    right = torch.zeros(4, 50, dtype=torch.bool)
    right[0, :40], right[1, :20], right[2, :21], right[3, :20] = True, True, True, True
    rows = [row(80, WEIGHTS), row(42, WEIGHTS, size=48), row(40, SCRATCH), row(40, SCRATCH, size=48)]
    answers = [right[0], right[2], right[1], right[3]]
    at_train, larger = brought(rows, answers)
    assert (at_train.by, larger.by, at_train.at_train, larger.at_train) == (40, 2, True, False)
    assert 20 < at_train.interval.low < 40 < at_train.interval.high + 5
    assert larger.interval.has_zero
    found = verdict(rows, answers, {"config": {"optim": {"epochs": 30}}})
    assert "At 32 (training) the weights brought +40.0 points [" in " ".join(found.short)
    part = dict(found.parts)["What the weights brought, against the same model from scratch:"]
    assert part[0].startswith("At 32 (training) +40.0 points [")
    assert "learned has 80.0%, from scratch 40.0%" in part[0]
    assert "1 seed on 50 test images" in part[2]
    assert "30 epochs, which is short for a model from scratch" in part[3]
    assert "from scratch" not in " ".join(sentence for heading, part in found.parts[:1] for sentence in part)
    several = [row(80 + seed, WEIGHTS, seed) for seed in range(3)] + [
        row(40 - seed, SCRATCH, seed) for seed in range(3)
    ]
    one = brought(several)[0]
    assert (one.by, one.seeds) == (42, 3)
    assert one.interval.low < 42 < one.interval.high
    assert "it cannot be told whether the weights brought anything" in " ".join(
        verdict([row(42, WEIGHTS), row(40, SCRATCH)], [right[2], right[3]]).short
    )
    assert brought([row(80, ""), row(40, "", encoding="none")]) == []


def test_the_next_command_starts_from_weights_that_are_at_hand(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    mine, out = str(tmp_path / "photos"), tmp_path / "study"
    assert at_hand(out, mine) is None
    same = weights(tmp_path / "same")
    (same / "config.yaml").write_text(f"data: {{root: {mine}}}\n")
    assert at_hand(out, mine) is None, "no task: it is not known to be a classifier"
    arguments = dict(SIZES, position="learned", class_token=False, global_pool="avg")
    for name, root in (("other", "elsewhere"), ("same", mine)):
        save_model(tmp_path / name / "last", ViT(**arguments), arguments, task="classification", **ABOUT)
        (tmp_path / name / "config.yaml").write_text(f"data: {{root: {root}}}\n")
    assert at_hand(out, mine) == str(tmp_path / "other"), (
        "a classifier of the same photos may have seen the test images"
    )
    command = f"vit2dpe study --root {mine} --train-size 48 --model.width 96 --epochs 5 --encodings none,rope"
    rows = [row(80, "", encoding="none"), row(42, "", encoding="rope")]
    found = verdict(rows, None, {"command": command, "weights at hand": "runs/other"})
    assert found.next == f"vit2dpe study --root {mine} --encodings none,rope --init runs/other"
    assert found.why == "To start from weights that are at hand"


def test_tables_of_studies_without_weights_stay_as_they_were() -> None:
    assert "start" not in to_csv([row(1, "")]).splitlines()[0]
    assert to_csv([row(1, ""), row(1, SCRATCH)]).splitlines()[0].endswith(",start")
    assert ModelSpec("ViT", {}).kind == "ViT"
