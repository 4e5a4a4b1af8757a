"""One's own photos, by `--root` alone: train, evaluate, pretrain and probe on what lies there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.data.pictures import photos
from tests.helpers import read_csv
from vit2dpe.cli import main
from vit2dpe.spec import flat
from vit2dpe.training.objectives.images import check
from vit2dpe.training.pretrain_settings import PretrainConfig
from vit2dpe.training.run_folder import changed_settings
from vit2dpe.training.settings import TrainConfig, resolve, sized

MICRO = [
    "--model.width",
    "24",
    "--model.depth",
    "1",
    "--model.heads",
    "2",
    "--epochs",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
]


@pytest.fixture(autouse=True)
def mine(cache: Path, tmp_path: Path) -> Path:
    return photos(tmp_path / "photos")


def run(command: str, *words: object) -> int:
    return main([command, *map(str, words)])


@pytest.mark.need("D11")
def test_train_evaluate_and_probe_use_one_split(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", "--root", mine, "--out", out, *MICRO, "--seed", 3) == 0
    told = capsys.readouterr().out
    assert "6 of 24 images, 0.2 of every class, are held out by seed 3" in told
    assert "note: trained at 48, by their median short side; --size chooses another" in told
    assert told.count("the short side is brought to 48, the centre kept (data.fit crop)") == 1
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["data"]["size"], settings["model"]["patch"], settings["augment"]["shift"]) == ("48", 8, 6)
    assert settings["optim"]["batch_size"] == 4  # a quarter of 19, rounded down
    assert run("evaluate", "--model", out, "--root", mine, "--out", tmp_path / "ev", "--limit", 100) == 0
    told = capsys.readouterr().out
    assert "images: 6 used of 6" in told
    assert "measured are those that it held out" in told
    score = float(read_csv(out / "metrics.csv")[-1]["test_top1"])
    assert float(read_csv(tmp_path / "ev/results.csv")[0]["top1"]) == pytest.approx(score, abs=0.01)
    shutil.copytree(mine, tmp_path / "others")
    assert run("evaluate", "--model", out, "--root", tmp_path / "others", "--out", tmp_path / "ev2") == 0
    assert "images: 24 used of 24" in capsys.readouterr().out
    assert run("probe", "--run", out, "--k", 2) == 0
    told = capsys.readouterr().out
    assert "or others" not in told
    assert [row["n_test"] for row in read_csv(out / "probe.csv")] == ["6", "6"]
    assert run("train", "--root", mine, "--out", out, *MICRO, "--seed", 3, "--resume") == 0
    assert " was " not in capsys.readouterr().out


def test_a_table_is_read_by_each_command(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in sorted(mine.glob("*/*.png"))]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *lines]))
    table, out = tmp_path / "labels.csv", tmp_path / "run"
    assert run("train", "--root", table, "--fit", "pad", "--size", 32, "--out", out, *MICRO) == 0
    assert "the long side is brought to 32, the rest is black (data.fit pad)" in capsys.readouterr().out
    assert run("evaluate", "--model", out, "--data", table, "--out", tmp_path / "ev") == 0
    assert "images: 6 used of 6" in capsys.readouterr().out
    score = float(read_csv(out / "metrics.csv")[-1]["test_top1"])
    assert float(read_csv(tmp_path / "ev/results.csv")[0]["top1"]) == pytest.approx(score, abs=0.01)


@pytest.mark.need("D9")
def test_pretraining_takes_images_alone_and_a_probe_wants_classes(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat_folder, out = tmp_path / "flat", tmp_path / "pre"
    flat_folder.mkdir()
    for path in mine.glob("*/*.png"):
        shutil.copy(path, flat_folder / f"{path.parent.name}{path.name}")
    small = ["--decoder.width", 24, "--decoder.depth", 1, "--decoder.heads", 2, "--pictures", 2, "--epochs", 1]
    assert run("pretrain", "--root", flat_folder, "--out", out, *MICRO, *small) == 0
    told = capsys.readouterr().out
    assert "images without classes" in told
    assert "--data.root FOLDER_WITH_CLASSES" in told
    assert (out / "reconstructions.png").is_file()
    assert run("probe", "--run", out) == 2
    assert "pretrained on images without classes: name some with classes" in capsys.readouterr().err
    assert run("probe", "--run", out, "--root", mine, "--k", 2) == 0
    assert run("train", "--root", flat_folder, "--out", tmp_path / "no", *MICRO) == 2
    assert "holds 24 images and no class folders" in capsys.readouterr().err
    assert run("train", "--root", mine, "--init", out, "--out", tmp_path / "fine", *MICRO[6:]) == 0


def test_what_the_size_decides_stays_open_until_it_is_known() -> None:
    open_ = resolve(TrainConfig.of(root="somewhere"))
    assert (open_.data.source, open_.model.patch, open_.augment.shift, open_.model.width) == ("folder", None, None, 192)
    for photos_, size, expected in ((True, (128, 128), (16, 16)), (True, (32, 32), (4, 4)), (False, (64, 64), (4, 4))):
        filled = sized(open_, size, photos=photos_)
        assert (filled.model.patch, filled.augment.shift) == expected
    given = resolve(TrainConfig.of(root="somewhere", size=64, patch=16))
    assert (given.model.patch, given.augment.shift) == (16, 8)
    named = resolve(TrainConfig.of(data="folder", root="somewhere", size=64))
    assert (named.model.patch, named.augment.shift) == (4, 4)  # as ever
    assert check(TrainConfig.of(root="somewhere", crop=0.5)).augment.shift == 0
    assert check(TrainConfig.of(root="somewhere", model="vit2dpe_tiny_patch16_224")).model.patch is None
    assert resolve(TrainConfig()).data.name == "digits"


@pytest.mark.parametrize("kind", [TrainConfig, PretrainConfig])
def test_few_photos_make_small_batches(kind: type[TrainConfig], mine: Path, tmp_path: Path) -> None:
    assert kind.of(root=str(mine)).optim.batch_size == 4
    assert kind.of(root=str(mine), batch_size=16).optim.batch_size == 16
    assert kind.of(root=str(mine), data="folder").optim.batch_size == 128
    assert kind.of(root=str(tmp_path / "nowhere")).optim.batch_size == 2
    (tmp_path / "linked").mkdir()
    for name in "abc":
        (tmp_path / "linked" / name).symlink_to(mine / name)
    assert kind.of(root=str(tmp_path / "linked")).optim.batch_size == 4
    (tmp_path / "many.csv").write_text("path,label\n" + "x,1\n" * 7000)
    assert kind.of(root=str(tmp_path / "many.csv")).optim.batch_size == 128


def test_what_was_chosen_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {name: digits, size: '48'}\nmodel: {patch: 8}\noptim: {lr: 0.5}")
    assert changed_settings(tmp_path, TrainConfig()) == ["optim.lr was 0.5, is now 0.001"]
    assert flat(TrainConfig())["data.name"] is None
