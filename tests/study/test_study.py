"""The study end to end on micro models: files, resuming, interruption, and one clear line for bad input."""

import json
import re
import sys

import pytest
import torch

from tests.helpers import read_csv
from vit2dpe import load_run
from vit2dpe.cli import main
from vit2dpe.data.datasets import load_images, normalize
from vit2dpe.encodings import ENCODINGS
from vit2dpe.resolution.sweep import fit_size
from vit2dpe.spec import split_words
from vit2dpe.study import StudyConfig, read_rows, run, study, trials
from vit2dpe.study.plan import check
from vit2dpe.study.rows import COLUMNS
from vit2dpe.study.settings import resolve

MICRO = dict(
    encodings="none,rope,sincos+relative", sizes="16,24x32", epochs=1, limit_train=64, limit_test=40, width=16, depth=1,
    heads=2, batch_size=32, jobs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    study(StudyConfig.of(MICRO, out=str(out), seeds=2), command="vit2dpe study --micro")
    return out


def test_it_writes_what_it_promises(finished):
    rows = read_csv(finished / "results.csv")
    assert tuple(rows[0]) == COLUMNS[: COLUMNS.index("depth")], "the depth where there are several"
    # none: 1 policy; rope: 4; of a sum of a formula and a table what its parts do, and what they have in common
    assert len(rows) == 2 * (1 + 4 + 2) * 2 * 2
    assert {r["policy"] for r in rows if r["encoding"] == "sincos+relative"} == {"default", "interpolate"}
    assert {(r["height"], r["width"]) for r in rows} == {("16.0", "16.0"), ("24.0", "32.0")}
    assert {r["seed"] for r in rows} == {"0.0", "1.0"}
    assert all(float(r["n"]) == 40 and r["value"] == r["top1"] for r in rows)
    assert (finished / "accuracy_vs_size.png").read_bytes().startswith(b"\x89PNG")
    summary = (finished / "summary.md").read_text()
    assert "vit2dpe study --micro" in summary
    assert "**16**" in summary
    assert "±" in summary
    page = (finished / "report.html").read_text()
    assert 'id="data"' in page
    assert "://" not in page.split("<pre>")[0], "the page asks for nothing from a network"
    env = json.loads((finished / "env.json").read_text())
    assert {"command", "torch", "timm", "python", "hardware", "data", "config"} <= set(env)
    for folder in (finished / "cells").iterdir():
        assert len(read_csv(folder / "metrics.csv")) == 1


@pytest.mark.parametrize("word", ["none", "rope", "sincos+relative"])
def test_a_trained_model_loads_again_and_gives_the_same_logits(finished, word):
    (folder,) = (finished / "cells").glob(f"{word}-seed1-*")
    model = load_run(folder)
    about = model.about
    data = load_images("digits", limit_train=64, limit_test=40)
    x = fit_size(normalize(data.test.images / 255, about["mean"], about["std"]), (16, 16), "scale", (16, 16))
    row = next(
        r for r in read_csv(finished / "results.csv")
        if (r["encoding"], r["seed"], r["height"], r["mode"]) == (word, "1.0", "16.0", "scale")
    )  # fmt: skip
    with torch.no_grad():
        logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, data.test.labels).item()
    assert loss == pytest.approx(float(row["loss"]), abs=1e-6)
    again = load_run(folder / "last")
    with torch.no_grad():
        assert torch.equal(again(x), logits)
    assert about["arguments"]["position"] == word


def test_a_finished_trial_is_not_trained_again(finished, monkeypatch, capsys):
    before = (finished / "results.csv").read_bytes()
    monkeypatch.setattr(trials, "fit", None)  # training would fail
    study(StudyConfig.of(MICRO, out=str(finished), seeds=2), command="again")
    assert (finished / "results.csv").read_bytes() == before
    assert capsys.readouterr().out.count("finished before") == 6


def test_other_sizes_measure_a_trained_model_without_training_it(finished, monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "fit", None)
    study(StudyConfig.of(MICRO, out=str(finished), encodings="rope", sizes="20"), command="again")
    assert {r["height"] for r in read_csv(finished / "results.csv")} == {"20.0"}


def test_a_changed_setting_trains_anew(finished, monkeypatch):
    monkeypatch.setattr(trials, "fit", None)
    with pytest.raises(TypeError):
        study(StudyConfig.of(MICRO, out=str(finished), lr=0.5), command="again")


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    for name in ("a", "b"):
        study(StudyConfig.of(MICRO, out=str(tmp_path / name), encodings="rope_mixed"))
    assert (tmp_path / "a/results.csv").read_bytes() == (tmp_path / "b/results.csv").read_bytes()


def test_an_interrupt_keeps_finished_trials(tmp_path, monkeypatch):
    real = trials.fit

    def interrupted(*args, folder, **kwargs):
        if folder.name.startswith("rope"):
            raise KeyboardInterrupt
        return real(*args, folder=folder, **kwargs)

    monkeypatch.setattr(trials, "fit", interrupted)
    args = ["study", "--encodings", "none,rope", "--smoke", "--width", "16", "--depth", "1", "--heads", "2"]
    args += ["--out", str(tmp_path)]
    assert main(args) == 130
    assert {r["encoding"] for r in read_csv(tmp_path / "results.csv")} == {"none"}
    assert "1 of 2 trials" in (tmp_path / "summary.md").read_text()
    monkeypatch.setattr(trials, "fit", real)
    assert main(args) == 0
    assert {r["encoding"] for r in read_csv(tmp_path / "results.csv")} == {"none", "rope"}


def test_a_picture_is_there_while_the_first_trial_still_trains(tmp_path, monkeypatch):
    real, seen = trials.fit, []

    def watched(*args, progress, **kwargs):
        def spy(row):
            progress(row)
            seen.append((tmp_path / "accuracy_vs_size.png").is_file())

        return real(*args, progress=spy, **kwargs)

    monkeypatch.setattr(trials, "fit", watched)
    study(StudyConfig.of(MICRO, out=str(tmp_path), encodings="none"))
    assert seen[0], "the picture is there from the first progress report on"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--encodings", "none,roep"], "unknown encoding 'roep'; did you mean 'rope'"),
        (["--encodings", "rope(bsae=3)"], "did you mean 'base'"),
        (["--encodings", "rope", "--width", "30", "--heads", "6"], "even head width, got 5"),
        (["--sizes", "16,18"], "multiple of the patch 4x4: got 18x18"),
        (["--sizes", "16,x"], "32 or 32x48"),
        (["--train-size", "15"], "got 15x15"),
        (["--modes", "scael"], "did you mean 'scale'"),
        (["--policies", "interpolte"], "did you mean 'interpolate'"),
        (["--temperatures", "lgo"], "known: none, log, yarn"),
        (["--data", "folder", "--root", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--device", "cuda:99"], "--device cpu"),
        (["--epochs", "many"], "epochs"),
        (["--seeds", "0"], "seeds must be in [1, 10000], got 0"),
        (["--arch", "swim"], "did you mean 'swin'"),
        (["--arch", "swin", "--stages", "2,many"], "stages: whole numbers above 0"),
        (["--arch", "swin", "--encodings", "rope,none,lookhere(view=0)"], "0 < view <= 360"),
        (["--encodigs", "rope"], "did you mean --encodings"),
        (["--precision", "float8"], "precision"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_costs_one_line_and_status_2(args, message, tmp_path, capsys):
    assert main(["study", *args, "--smoke", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("vit2dpe: ")
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["study"]) == 2
    assert "pip install jsonargparse" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["study", "--smoke", "--out", str(tmp_path)]) == 2
    assert 'pip install -e ".[recipes]", in the clone' in capsys.readouterr().err


def test_recipes_are_read_and_hyphens_are_fine(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "study", lambda config, command: seen.append((config, command)))
    assert main(["study", "--config", "recipes/study_cifar10_cpu.yaml", "--limit-train", "500", "--quick"]) == 0
    assert main(["study", "--config", "recipes/study_digits.yaml"]) == 0
    assert main(["study", "--config", "recipes/study_cifar10.yaml", "--flip=false"]) == 0
    (cpu, command), (digits, _), (gpu, _) = seen
    assert (cpu.data.limit_train, cpu.model.width, cpu.quick) == (500, 96, True)
    assert "--limit-train 500" in command
    assert digits == StudyConfig.of(out=digits.run.out) == resolve(digits), "the recipe states the defaults"
    assert gpu.augment.flip is False
    for config, _ in seen:
        check(config)


def test_a_swin_is_studied_over_what_its_windows_do(tmp_path):
    swin = dict(MICRO, arch="swin", stages="1,1", patch=2, window=4, encodings="relative,alibi", modes="scale")
    study(StudyConfig.of(swin, out=str(tmp_path)))
    rows = read_csv(tmp_path / "results.csv")
    assert {r["policy"] for r in rows if r["encoding"] == "relative"} == {
        f"{window}+{policy}" for window in ("keep", "scale") for policy in ("resize", "interpolate")
    }
    assert {r["policy"] for r in rows if r["encoding"] == "alibi"} == {
        f"{window}+{policy}" for window in ("keep", "scale") for policy in ("extrapolate", "interpolate")
    }
    (folder,) = (tmp_path / "cells").glob("relative-*")
    assert type(load_run(folder)).__name__ == "Swin"


def test_all_means_every_name():
    assert check(StudyConfig.of(encodings="all")).encodings == tuple(ENCODINGS)


def test_smoke_is_small_whatever_the_recipe_says():
    small = resolve(StudyConfig.of(smoke=True, batch_size=256, seeds=5, epochs=100, limit_train=5000))
    assert (small.optim.batch_size, small.data.limit_train, small.seeds, small.optim.epochs) == (16, 32, 1, 1)


def test_quick_fills_only_what_was_not_said():
    quick = StudyConfig.of(quick=True, epochs=3)
    assert quick.optim.epochs == 3
    assert len(quick.encodings) == 3


def test_words_keep_their_commas_inside_parentheses():
    assert split_words("rope(base=3, x=1), none,") == ["rope(base=3, x=1)", "none"]


def test_processes_of_torchrun_do_not_all_write_one_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "--smoke", "--out", str(tmp_path / "study")]) == 2
    assert "vit2dpe study is one process, torchrun started 2" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_unknown_commands_and_pictures(tmp_path, capsys):
    assert main(["stduy"]) == 2
    assert "did you mean 'study'" in capsys.readouterr().err
    for words in (["text"], ["text", "--help"]):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert re.findall(r"^  vit2dpe (text \w+) ", said, re.MULTILINE) == ["text train", "text sample"]
    assert main(["text", "sampel"]) == 2
    assert "unknown command 'text sampel'; did you mean 'text sample'" in capsys.readouterr().err
    out = tmp_path / "two.png"
    assert main(["show", "rope", "relative", "--grid", "5x8", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["show", "rope", "--grid", "5xx8"]) == 2
    assert "14x14" in capsys.readouterr().err


def test_a_short_finetune_at_the_new_size_has_rows_of_its_own(tmp_path, monkeypatch):
    trained = []
    real = trials.fit

    def spy(model, task, *args, **kwargs):
        trained.append(task.train_size)
        return real(model, task, *args, **kwargs)

    monkeypatch.setattr(trials, "fit", spy)
    config = StudyConfig.of(
        encodings="learned", train_size="8x12", sizes="8,8x12,16", modes="scale", policies="default", finetune=1,
        epochs=1, width=16, depth=1, heads=2, batch_size=32, limit_train=64, limit_test=40, device="cpu", jobs=1,
        out=str(tmp_path),
    )  # fmt: skip
    study(config)
    assert trained == [(8, 12), (8, 8), (16, 16)], "once at the training size, then on from there at each other one"
    rows = read_rows(tmp_path / "results.csv")
    fine = {row.size: row for row in rows if row.policy == "finetuned"}
    assert fine.keys() == {(8, 8), (16, 16)}
    assert all(row.train_size == (8, 12) for row in fine.values())
    plain = {row.size: row.loss for row in rows if row.policy != "finetuned"}
    assert all(row.loss != plain[size] for size, row in fine.items())
    assert "finetuned" in (tmp_path / "summary.md").read_text()
    study(config)
    assert len(trained) == 3, "finished trials are read"
