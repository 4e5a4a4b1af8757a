"""A study of one's own photos by `--root` alone: the size it trains at, what it measures, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.data.pictures import photos, pixels, save
from tests.helpers import read_csv
from vit2dpe.cli import main
from vit2dpe.data.photos import survey
from vit2dpe.errors import ConfigError
from vit2dpe.study import settle as module
from vit2dpe.study.plan import check
from vit2dpe.study.settings import StudyConfig, resolve
from vit2dpe.study.settle import at_size, estimate, settle
from vit2dpe.study.sizes import _batch

MICRO = ["--width", "24", "--depth", "1", "--heads", "2", "--epochs", "1", "--encodings", "none,rope", "--jobs", "1"]
MICRO += ["--modes", "scale", "--policies", "default", "--device", "cpu"]


@pytest.fixture(autouse=True)
def mine(cache: Path, tmp_path: Path) -> Path:
    return photos(tmp_path / "photos")


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes whose time was estimated: a minute for each of 4 pixels."""
    asked: list[int] = []

    def fake(plan: object, *_: object) -> float:
        asked.append(plan.train_size[0])
        return asked[-1] / 4

    monkeypatch.setattr(module, "estimate", fake)
    return asked


def test_from_a_folder_to_a_report(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["study", "--root", str(mine), "--out", str(out), *MICRO]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "note: trained at 48, about " in told
    assert "minutes in all: 56 is the photos' median short side" in told
    assert "photos are enlarged at 72, 96, 144: their median short side is" in told
    assert "6 of 24 images, 0.2 of every class, are held out by seed 0" in told
    assert {(row["height"], row["n"]) for row in read_csv(out / "results.csv")} == {
        ("48.0", "6.0"), ("72.0", "6.0"), ("96.0", "6.0"), ("144.0", "6.0")}  # fmt: skip
    assert (out / "report.html").is_file()
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["data"]["size"], settings["sizes"], settings["model"]["patch"]) == ("48", "48,72,96,144", 8)
    (out / "results.csv").unlink()
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "trained at 48, as before" in told
    assert told.count("finished before") == 2
    cell = next((out / "cells").iterdir())
    assert main(["evaluate", "--model", str(cell), "--root", str(mine), "--out", str(tmp_path / "ev")]) == 0
    assert "images: 6 used of 6" in capsys.readouterr().out


def test_the_largest_size_that_fits(mine: Path, tmp_path: Path, minutes: list[int], capsys) -> None:
    config = StudyConfig.of(root=str(photos(tmp_path / "large", each=2)), encodings="rope", out=str(tmp_path / "out"))
    for name in "abc":
        for path in (tmp_path / "large" / name).iterdir():
            save(path, pixels(int(path.stem), 130, 200))
    assert settle(config).train_size == (32, 32)
    assert minutes == [128, 96, 64, 48, 32]
    assert "the largest size that fits into --minutes 10" in capsys.readouterr().out
    changed = StudyConfig.of(root=config.data.root, encodings="rope", out=str(tmp_path / "out"), minutes=100)
    plan = settle(changed)
    assert (plan.train_size, plan.config.model.patch, plan.config.augment.shift) == ((128, 128), 16, 16)
    assert plan.sizes == ((128, 128), (192, 192), (256, 256), (384, 384))
    assert json.loads((tmp_path / "out/size.json").read_text())["size"] == 128
    settle(StudyConfig.of(root=config.data.root, encodings="rope", out=str(tmp_path / "out2"), minutes=2))
    assert "trained at 32: about 8 minutes, no size fits into --minutes 2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="minutes must be above 0"):
        settle(StudyConfig.of(root=config.data.root, out=str(tmp_path / "out3"), minutes=0))


def test_what_is_given_is_kept(mine: Path, tmp_path: Path, minutes: list[int]) -> None:
    plan = settle(StudyConfig.of(root=str(mine), encodings="rope", train_size=64, patch=16, out=str(tmp_path / "out")))
    assert (plan.train_size, plan.config.model.patch, plan.sizes[1]) == ((64, 64), 16, (96, 96))
    plan = settle(StudyConfig.of(root=str(mine), encodings="rope", sizes="40,80", patch=8, out=str(tmp_path / "out")))
    assert plan.sizes == ((40, 40), (80, 80))
    plan = settle(StudyConfig.of(root=str(mine), encodings="rope", train_size="32x48", out=str(tmp_path / "out")))
    assert plan.sizes == ((32, 48), (48, 72), (64, 96), (96, 144))


def test_a_named_folder_of_images_of_one_size_is_studied_as_ever(tmp_path: Path, minutes: list[int]) -> None:
    for name in "ab":
        save(tmp_path / "same" / name / "1.png", pixels(1, 40, 40))
    plan = settle(StudyConfig.of(data="folder", encodings="rope", root=str(tmp_path / "same")))
    assert (plan.train_size, [size[0] for size in plan.sizes]) == ((32, 32), [24, 32, 48, 64, 96])
    model, optim = plan.config.model, plan.config.optim
    assert (model.patch, model.width, model.depth, plan.config.augment.shift) == (4, 192, 9, 4)
    assert (optim.epochs, optim.batch_size, minutes) == (60, 128, [])


def test_few_photos_and_many(mine: Path, tmp_path: Path) -> None:
    few = resolve(StudyConfig.of(root=str(mine)))
    assert (few.model.width, few.model.depth, few.optim.batch_size, few.optim.epochs) == (96, 4, 4, 40)
    (tmp_path / "many.csv").write_text("path,label\n" + "x,1\n" * 7000)
    many = resolve(StudyConfig.of(root=str(tmp_path / "many.csv")))
    assert (many.data.source, many.model.width, many.optim.batch_size) == ("csv", 192, 128)


def test_the_estimate_counts_every_training_and_measurement(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_timed", lambda run, device: run() or 0.001)
    config = resolve(StudyConfig.of(root=str(mine), encodings="none,rope", width=24, depth=1, heads=2, jobs=1))
    found = survey(config.data)
    plan = check(at_size(config, (32, 32)))
    total = estimate(plan, found)
    steps = 24 * 0.8 / 8 * 40  # of eight images, which are what is timed
    forward = 24 * 0.2 / 2 * 40  # each epoch
    rows = 24 * 0.2 / 2 * 4 * 2  # four sizes, two modes
    policies = 1 + 4
    expected = 0.001 * module.MARGIN * (2 * (steps + forward) + rows * policies) / 60
    assert total == pytest.approx(expected)
    doubled = check(at_size(resolve(StudyConfig.of(root=str(mine), encodings="none,rope", width=24, depth=1, heads=2,
                                                   jobs=1, seeds=2)), (32, 32)))  # fmt: skip
    assert estimate(doubled, found) == pytest.approx(2 * total)
    assert estimate(plan, found, enough=1e-9) > 0


def test_large_maps_of_attention_are_measured_in_small_batches(mine: Path, tmp_path: Path) -> None:
    assert (
        _batch(settle(StudyConfig.of(root=str(mine), encodings="rope", train_size=32))) == 256
    )  # 96 pixels, 576 tokens
    assert _batch(settle(StudyConfig.of(root=str(mine), encodings="rope", train_size=224))) == 27


def test_settings_of_photos_are_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--task", "reverse", "--minutes", "3", "--fit", "pad"]) == 2
    assert "task reverse has no use for fit, minutes" in capsys.readouterr().err
    assert main(["study", "--fit", "pad"]) == 2
    assert "those of digits have one: leave it out" in capsys.readouterr().err
