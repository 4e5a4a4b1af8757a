"""The study on text and on sequences: the same files as on images, and numbers that are what they say."""

import json
import math

import pytest
import torch

from tests.helpers import read_csv
from vit2dpe import load_run, use_policy
from vit2dpe.cli import main
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.study.lengths import text_scores
from vit2dpe.study.rows import COLUMNS
from vit2dpe.study.settings import StudyConfig, resolve
from vit2dpe.training.tasks.sequences import SEQUENCES, SequenceTask, answers

SMALL = ["--width", "16", "--heads", "2", "--batch-size", "4", "--smoke", "--device", "cpu"]


def rows_of(out):
    return read_csv(out / "results.csv")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 80)
    return path


def test_perplexity_over_length(text, tmp_path, capsys):
    out = tmp_path / "study"
    command = ["study", "--task", "text", "--root", str(text), "--train-length", "16", "--lengths", "16,32"]
    command += ["--encodings", "learned,rope", "--temperatures", "none,log", "--depth", "1", "--out", str(out), *SMALL]
    assert main(command) == 0, capsys.readouterr().err
    rows = rows_of(out)
    assert tuple(rows[0]) == COLUMNS[: COLUMNS.index("depth")], "the depth where there are several"
    assert {(r["height"], r["width"], r["train_height"], r["train_width"]) for r in rows} == {
        ("1", "16", "1", "16"),
        ("1", "32", "1", "16"),
    } or {r["width"] for r in rows} == {"16.0", "32.0"}
    assert {r["policy"] for r in rows if r["encoding"] == "rope"} == {"extrapolate", "interpolate", "ntk", "yarn"}
    assert {r["mode"] for r in rows} == {"all tokens", "last 64 tokens"}
    assert all(float(r["value"]) == pytest.approx(math.exp(float(r["loss"]))) for r in rows)
    assert {p.name for p in out.iterdir()} >= {
        "accuracy_vs_size.png", "report.html", "summary.md", "results.csv", "config.yaml", "env.json",
    }  # fmt: skip
    assert "perplexity over length" in (out / "summary.md").read_text()
    assert "N(0, 0.02)" in json.loads((out / "env.json").read_text())["tables"]
    capsys.readouterr()
    assert main(command) == 0
    assert "finished before" in capsys.readouterr().out
    # The numbers are those of the saved model, under the policy of the row.
    model = load_run(next(p for p in (out / "cells").iterdir() if p.name.startswith("rope")))
    data = text.read_text()[: 20 * 32]
    symbols = sorted(set(data))
    ids = torch.tensor([symbols.index(c) for c in data[round(0.9 * len(data)) :]])
    row = next(
        r
        for r in rows
        if (r["encoding"], r["policy"], r["temperature"], r["mode"], float(r["width"]))
        == ("rope", "ntk", "log", "all tokens", 32)
    )
    with use_policy(model, "ntk", temperature="log"):
        assert text_scores(model, ids, 32)["all tokens"].loss == pytest.approx(float(row["loss"]), rel=1e-6)


def test_the_end_of_a_window_is_measured_by_itself():
    torch.manual_seed(0)
    model, ids = (
        TextDecoder("alibi", vocab_size=9, context=80, embed_dim=16, depth=1, num_heads=2),
        torch.randint(9, (241,)),
    )
    scores = text_scores(model, ids, 80)
    with torch.no_grad():
        logits = model.eval()(ids[:240].view(3, 80))
    loss = -logits.log_softmax(-1).gather(-1, ids[1:241].view(3, 80, 1))[..., 0]
    assert scores["all tokens"].loss == pytest.approx(float(loss.mean()), rel=1e-5)
    assert scores["last 64 tokens"].loss == pytest.approx(float(loss[:, 16:].mean()), rel=1e-5)
    assert [s.n for s in scores.values()] == [240, 192]


def test_a_sequence_task_over_depth(tmp_path, capsys):
    out = tmp_path / "study"
    command = ["study", "--task", "reverse", "--depths", "1,2", "--encodings", "sincos,none", "--out", str(out), *SMALL]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert [f"[{i}/4] {word}, depth {depth}, " in said for i, depth, word in
            ((1, 1, "sincos"), (2, 1, "none"), (3, 2, "sincos"), (4, 2, "none"))] == [True] * 4  # fmt: skip
    rows = rows_of(out)
    assert [(r["encoding"], r["mode"], r["metric"]) for r in rows] == [
        ("sincos", "depth 1", "exact"),
        ("none", "depth 1", "exact"),
        ("sincos", "depth 2", "exact"),
        ("none", "depth 2", "exact"),
    ]
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# Sequence study")
    assert "sequences right in percent, sequences of 16" in summary
    assert "| encoding | policy | depth 1 | depth 2 |" in summary
    assert "learned tables start at N(0, 0.02), truncated" in summary
    assert len([line for line in summary.splitlines() if line.startswith(("| sincos", "| none"))]) == 2


def test_the_presets_are_those_of_the_task():
    config = StudyConfig.of(task="text")
    assert (config.encodings[3:6], config.train_length, config.lengths) == (
        ("t5", "alibi", "fire"),
        256,
        (256, 512, 1024, 2048),
    )
    assert StudyConfig.of(task="reverse").encodings == ("sincos", "learned", "none")
    config = StudyConfig.of()
    assert (config.encodings[3], config.data.size, config.optim.epochs) == ("relative", (16, 16), 40)
    assert StudyConfig.of(data="cifar10").optim.lr == 1e-3
    assert resolve(StudyConfig()) == config, "what is null is the preset's"


def test_validation_can_be_cut(text, tmp_path, capsys):
    command = ["study", "--task", "text", "--root", str(text), "--train-length", "16", "--lengths", "16,32"]
    command += ["--encodings", "none", "--depth", "1", "--epochs", "1", "--limit-test", "100", "--width", "16"]
    command += ["--heads", "2", "--batch-size", "1", "--device", "cpu", "--out", str(tmp_path / "study")]
    assert main(command) == 0, capsys.readouterr().err
    rows = [row for row in rows_of(tmp_path / "study") if row["mode"] == "all tokens"]
    assert [float(row["n"]) for row in rows] == [96, 96]  # six windows of 16, three of 32


def test_answers_are_right():
    x = torch.tensor([[3, 1, 2]])
    found = {name: task(x).tolist()[0] for name, task in SEQUENCES.items()}
    assert found == {"copy": [3, 1, 2], "reverse": [2, 1, 3], "sort": [1, 2, 3]}
    task = SequenceTask("reverse", 7, 5, 3, seed=2)
    batch = task.batch(1, 2)
    assert torch.equal(batch["labels"], batch["tokens"].flip(1))
    assert torch.equal(task.batch(1, 2)["tokens"], batch["tokens"])
    assert not torch.equal(task.batch(1, 1)["tokens"], batch["tokens"])

    class Perfect(torch.nn.Module):
        def forward(self, tokens):
            wrong = tokens.flip(1).clone()
            wrong[:250, 0] = (wrong[:250, 0] + 1) % 10  # a quarter of 1,000, one token each
            return torch.nn.functional.one_hot(wrong, 10).float()

    score = answers(Perfect(), "reverse", 7)
    assert score["exact"] == 75.0
    assert score["top1"] == pytest.approx(100 - 25 / 7)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "txt"], "did you mean 'text'"),
        (["--task", "text", "--root", "no.txt"], "there is no text at no.txt: give another --root"),
        (["--task", "reverse", "--depths", "one"], "depths: whole numbers above 0"),
        (["--task", "sort", "--encodings", "rop"], "did you mean 'rope'"),
        (["--task", "text", "--sizes", "16,24", "--flip", "false"], "task text has no use for sizes, flip"),
        (["--task", "copy", "--root", "text.txt"], "task copy has no use for root"),
        (["--task", "images", "--lengths", "2"], "task images has no use for lengths"),
        (["--task", "text", "--quick"], "quick is for the built-in digits"),
        (["--data", "folder", "--quick"], "quick is for the built-in digits"),
    ],
)
def test_settings_that_cannot_work(more, message, tmp_path, capsys):
    assert main(["study", *more, "--out", str(tmp_path / "study"), *SMALL]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow  # minutes: four trainings of 2,000 updates
def test_reversing_needs_places_and_copying_does_not(tmp_path):
    common = ["--epochs", "12", "--device", "cpu", "--depths", "1", "--out"]
    assert main(["study", "--task", "reverse", "--encodings", "sincos,none", *common, str(tmp_path / "r")]) == 0
    assert main(["study", "--task", "copy", "--encodings", "none", *common, str(tmp_path / "c")]) == 0
    exact = [float(r["value"]) for r in rows_of(tmp_path / "r")]
    assert exact[0] > 99
    assert exact[1] < 1
    assert float(rows_of(tmp_path / "c")[0]["value"]) > 99
