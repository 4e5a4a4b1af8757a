"""Images that cannot be read: by default the end of a run; with `unreadable: skip` left out, counted, and listed.

The files are really broken: cut off, empty, a web page. Whatever is kept must be what a folder without them gives.
"""

import errno
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.interrupted import after_updates
from vit2dpe.cli import main
from vit2dpe.data import image_cache as images
from vit2dpe.data.datasets import load_images
from vit2dpe.data.decode import Unreadable, decode
from vit2dpe.data.settings import DataConfig
from vit2dpe.errors import CheckpointError, ConfigError, DataError
from vit2dpe.study.evaluate import evaluate_model
from vit2dpe.study.settings import EvaluateConfig
from vit2dpe.training.checkpoint import load_run
from vit2dpe.training.objectives.images import train
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig, TrainConfig

fault = pytest.mark.fault
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
BAD = {"train/a/1.png": "cut", "train/b/3.png": "empty", "val/a/0.png": "page"}
LOADERS = pytest.mark.parametrize("cache", ["memory", "none"])


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))


def build(root):
    """Two classes, six images of each to train on and three to test."""
    draws = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(draws.integers(0, 256, (8, 12, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def damage(root, *names):
    for name in names:
        path = root / name
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "page": HTML}[BAD[name]])
    return root


@pytest.fixture
def broken(tmp_path):
    return damage(build(tmp_path / "broken"), *BAD)


@pytest.fixture
def clean(tmp_path):
    """The same folder after somebody deleted what is broken."""
    root = build(tmp_path / "clean")
    for name in BAD:
        (root / name).unlink()
    return root


def pixels(split):
    return split.pixels(torch.arange(len(split)))


def read_whole(root, cache):
    data = load_images("folder", root, cache=cache)
    return pixels(data.train), pixels(data.test)


@fault("F01", "F02", "F03")
@LOADERS
def test_by_default_the_run_ends(broken, cache):
    left = list(BAD)
    while left:
        with pytest.raises(DataError, match="no other image takes its place") as error:
            read_whole(broken, cache)
        (named,) = (name for name in left if f"{broken / name}: " in str(error.value))
        (broken / named).unlink()
        left.remove(named)
    read_whole(broken, cache)


@fault("F01", "F02", "F03")
@LOADERS
def test_left_out_counted_and_named_with_the_reason(broken, clean, cache):
    for _ in range(2):  # decoded, and from what is remembered
        data = load_images("folder", broken, cache=cache, unreadable="skip")
        rest = load_images("folder", clean, cache=cache)
        for split in ("train", "test"):
            mine, wanted = getattr(data, split), getattr(rest, split)
            assert torch.equal(mine.labels, wanted.labels)
            assert torch.equal(pixels(mine), pixels(wanted)), "what is kept is in its place, with its label"
        assert (data.mean, data.std) == (rest.mean, rest.std)
        assert data.used == "train 10 of 12, test 5 of 6"
        assert set(data.unreadable) == set(BAD)
        assert all(data.unreadable.values())
        assert "cannot identify" in data.unreadable["val/a/0.png"]
        assert "images of train that cannot be read, left out: 2 of 12" in data.notes
        assert "images of test that cannot be read, left out: 1 of 6" in data.notes
    assert rest.used == "train 10 of 10, test 5 of 5"


def test_what_is_remembered_is_forgotten_when_a_file_changes(broken, tmp_path):
    load_images("folder", broken, cache="none", unreadable="skip")
    (kept,) = (tmp_path / "cache").glob("*.unreadable.json")
    build(tmp_path / "again")
    (broken / "train/a/1.png").write_bytes((tmp_path / "again/train/a/1.png").read_bytes())
    assert load_images("folder", broken, cache="none", unreadable="skip").used == "train 11 of 12, test 5 of 6"
    for rest in (tmp_path / "cache").glob("*.unreadable.json"):
        rest.write_text("[half")
    assert load_images("folder", broken, cache="none", unreadable="skip").used == "train 11 of 12, test 5 of 6"
    assert kept.is_file()


def test_who_does_not_skip_is_not_served_what_another_skipped(broken):
    load_images("folder", broken, unreadable="skip")
    with pytest.raises(DataError, match=r"cannot read the image .*train/a/1\.png: "):
        load_images("folder", broken)


@LOADERS
def test_the_first_file_and_a_dangling_link(tmp_path, cache):
    root = build(tmp_path / "data")
    (root / "train/a/0.png").unlink()
    (root / "train/a/0.png").symlink_to(root / "nowhere.png")
    data = load_images("folder", root, cache=cache, unreadable="skip")
    assert data.used == "train 11 of 12, test 6 of 6"
    assert "No such file" in data.unreadable["train/a/0.png"]


@LOADERS
def test_a_part_held_out_and_limits_are_of_what_can_be_read(broken, clean, cache):
    how = dict(cache=cache, limit_train=8, limit_test=4, val_fraction=0.25, seed=3)
    mine, wanted = load_images("folder", broken, unreadable="skip", **how), load_images("folder", clean, **how)
    assert torch.equal(pixels(mine.val), pixels(wanted.val))
    assert mine.used == "train 6 and val 2 of 12, test 4 of 6"


@LOADERS
def test_so_many_that_it_is_no_accident(tmp_path, cache):
    root = build(tmp_path / "data")
    for i in range(11):
        (root / f"train/a/more{i}.png").write_bytes(HTML)
    with pytest.raises(DataError, match=r"11 of 23 images of train cannot be read, more than 1%.*train/a/more0\.png"):
        load_images("folder", root, cache=cache, unreadable="skip")
    (root / "train/a/more0.png").unlink()
    assert load_images("folder", root, cache=cache, unreadable="skip").used == "train 12 of 22, test 6 of 6"


@LOADERS
def test_a_class_is_never_lost(tmp_path, cache):
    root = build(tmp_path / "data")
    for path in (root / "val/a/0.png", *(root / "val/b").iterdir()):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"of 1 classes no image is left that can be read; among them val/b/0\.png"):
        load_images("folder", root, cache=cache, unreadable="skip")


def test_of_lost_classes_the_first_is_named(tmp_path):
    root = build(tmp_path / "data")
    for path in root.glob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"of 2 classes no image is left that can be read; among them val/a/0\.png"):
        load_images("folder", root, unreadable="skip")


def test_words_that_cannot_be(broken):
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        load_images("folder", broken, unreadable="skipp")
    with pytest.raises(ConfigError, match="skip is of files in class folders"):
        load_images("digits", unreadable="skip")


def settings(root, out, cache):
    return TrainConfig(
        model=ModelConfig(patch=4, width=16, depth=1, heads=2, position="rope"),
        data=DataConfig("folder", str(root), cache=cache, workers=0, unreadable="skip"),
        optim=OptimConfig(epochs=2, warmup_epochs=1, batch_size=4),
        run=RunConfig(str(out), device="cpu", threads=1),
    )


@fault("F01", "F02", "F03")
@LOADERS
def test_a_training_says_it_and_resumes_to_the_same_bits(broken, clean, tmp_path, cache, capsys):
    whole = train(settings(broken, tmp_path / "whole", cache))
    assert "note: images of train that cannot be read, left out: 2 of 12" in capsys.readouterr().out
    assert "Images used: train 10 of 12, test 5 of 6." in (whole / "summary.md").read_text()
    assert json.loads((whole / "env.json").read_text())["images"] == "train 10 of 12, test 5 of 6"
    listed = [json.loads(line) for line in (whole / "unreadable.jsonl").read_text().splitlines()]
    assert [one["file"] for one in listed] == list(BAD)
    assert all(one["reason"] for one in listed)

    without = train(settings(clean, tmp_path / "without", cache))
    assert not (without / "unreadable.jsonl").exists()
    state = load_run(whole).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load_run(without).state_dict().items())

    config = settings(broken, tmp_path / "cut", cache)
    # The machine goes away in the second epoch.
    with after_updates({5: interrupt}), pytest.raises(KeyboardInterrupt):
        train(config)
    train(replace(config, resume=True))
    assert all(torch.equal(value, state[name]) for name, value in load_run(tmp_path / "cut").state_dict().items())
    (broken / "train/b/3.png").write_bytes((broken / "train/b/2.png").read_bytes())  # repaired: other data
    with pytest.raises(CheckpointError, match="data"):
        train(replace(config, resume=True))


def interrupt(trainer):
    raise KeyboardInterrupt


def test_evaluation_counts_and_lists_them(broken, tmp_path, capsys):
    run = dict(
        model="test_resnet(num_classes=2)", untrained=True, data=str(broken), sizes="64", out=str(tmp_path / "e")
    )
    with pytest.raises(DataError, match=r"cannot read the image .*val/a/0\.png"):
        evaluate_model(EvaluateConfig(**run))
    capsys.readouterr()
    rows = evaluate_model(EvaluateConfig(**run, unreadable="skip"))
    assert [row.n for row in rows] == [5]
    assert "images: 5 used of 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "e/unreadable.jsonl").read_text())["file"] == "val/a/0.png"

    for name in BAD:
        Image.new("RGB", (12, 8)).save(broken / name)
    evaluate_model(EvaluateConfig(**run, unreadable="skip"))
    assert "images: 6 used of 6" in capsys.readouterr().out
    assert not (tmp_path / "e/unreadable.jsonl").exists()


def test_an_evaluation_with_a_limit_decodes_no_more_than_it_takes(broken, tmp_path, monkeypatch, capsys):
    run = dict(model="test_resnet(num_classes=2)", untrained=True, data=str(broken), sizes="64", unreadable="skip")
    for i in range(3, 40):
        (broken / f"val/b/{i:02}.png").write_bytes((broken / "val/b/0.png").read_bytes())
    tried = []
    monkeypatch.setattr(images, "decode", lambda path, *how: (tried.append(path), decode(path, *how))[1])
    rows = evaluate_model(EvaluateConfig(**run, limit=4, out=str(tmp_path / "e")))
    assert [row.n for row in rows] == [4], "two of each class: the limit is of what can be read"
    assert len(set(tried)) == len(tried) in (4, 5)
    assert "images: 4 used of 43" in capsys.readouterr().out
    tried.clear()
    rows = evaluate_model(EvaluateConfig(**run, limit=5, out=str(tmp_path / "f")))
    listed = [json.loads(line)["file"] for line in (tmp_path / "f/unreadable.jsonl").read_text().splitlines()]
    assert listed == ["val/a/0.png"], "the third of its class was tried, and another file of another class taken"
    assert [row.n for row in rows] == [5]
    assert len(set(tried)) == len(tried) == 6
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        evaluate_model(EvaluateConfig(**run, limit=0, out=str(tmp_path / "g")))


def test_a_limit_judges_what_was_tried(tmp_path):
    """More than ten bad ones among those tried are no accident; a class whose files were all tried is lost."""
    root = build(tmp_path / "data")
    run = dict(model="test_resnet(num_classes=2)", untrained=True, data=str(root), sizes="64", unreadable="skip")
    for i in range(3, 2000):
        (root / f"val/b/{i:04}.png").write_bytes(b"" if i < 1003 else (root / "val/b/0.png").read_bytes())
    with pytest.raises(DataError, match=r"\d\d of \d\d images of val cannot be read, more than 1%"):
        evaluate_model(EvaluateConfig(**run, limit=30, out=str(tmp_path / "e")))
    for path in (root / "val/a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"of 1 classes no image is left that can be read; among them val/a/[012]\.png"):
        evaluate_model(EvaluateConfig(**run, limit=2, out=str(tmp_path / "e")))


def test_what_is_kept_lies_where_it_was_decoded(broken, clean, monkeypatch):
    """A bad file costs no second tensor of the size of all: the images after it move up."""
    names = sorted(f"train/{path.parent.name}/{path.name}" for path in (broken / "train").glob("*/*.png"))
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: (made.append(empty(*size, **how)), made[-1])[1])
    decoded = images.decode_all(broken, names, None, skip=True)
    (whole,) = made
    assert decoded.images.data_ptr() == whole.data_ptr()
    monkeypatch.undo()
    left = [name for name in names if name not in BAD]
    assert torch.equal(decoded.images, images.decode_all(clean, left, None).images)
    assert [names[i] for i in decoded.unreadable] == ["train/a/1.png", "train/b/3.png"]


@LOADERS
def test_where_no_file_can_be_read_the_reason_is_told(tmp_path, cache):
    root = build(tmp_path / "data")
    for path in root.glob("*/*/*.png"):
        path.write_bytes(HTML)
    with pytest.raises(DataError, match=r"not one of 18 images .*; the first, train/a/0\.png: cannot identify"):
        load_images("folder", root, cache=cache, unreadable="skip")


def test_evaluation_of_tar_files_counts_and_lists_them_too(broken, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"tars/{split}.tar", "w") as archive:
            archive.add(broken / split, split)
    run = dict(model="test_resnet(num_classes=2)", untrained=True, sizes="64", out=str(tmp_path / "e"))
    rows = evaluate_model(EvaluateConfig(data="tar", root=str(tmp_path / "tars"), unreadable="skip", **run))
    said = capsys.readouterr().out
    assert [row.n for row in rows] == [5]
    assert "images: 5 used of 6" in said
    assert "left out: 1 of 6" in said
    assert len((tmp_path / "e/unreadable.jsonl").read_text().splitlines()) == len(BAD)


def test_what_the_system_says_of_itself_is_no_verdict_on_a_file(broken, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match="Too many open files; the file may be whole") as caught:
        decode(broken / "train/a/0.png")
    assert not isinstance(caught.value, Unreadable)


def test_a_study_and_a_pretraining_take_the_word_too(broken, tmp_path):
    words = [
        "study",
        "--smoke",
        "--data",
        "folder",
        "--root",
        str(broken),
        "--encodings",
        "none",
        "--train_size",
        "8x12",
    ]
    words += ["--sizes", "8x12", "--modes", "scale", "--patch", "4", "--width", "16", "--depth", "1", "--heads", "2"]
    words += ["--batch_size", "4", "--device", "cpu", "--out", str(tmp_path / "study")]
    assert main(words) == 2
    assert main([*words, "--unreadable", "skip"]) == 0
    assert json.loads((tmp_path / "study/env.json").read_text())["images"] == "train 8 of 12, test 5 of 6"
    assert (tmp_path / "study/unreadable.jsonl").read_text().count("\n") == 3
    words = ["pretrain", "--smoke", "--data.name", "folder", "--data.root", str(broken), "--data.unreadable", "skip"]
    words += ["--model.patch", "4", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
    words += ["--decoder.width", "16", "--decoder.depth", "1", "--decoder.heads", "2", "--pictures", "0"]
    assert main([*words, "--optim.batch_size", "4", "--run.out", str(tmp_path / "mae")]) == 0
    assert (tmp_path / "mae/unreadable.jsonl").read_text().count("\n") == 3
