"""One tar a split, and Hugging Face's datasets."""

import io
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image

from vit2dpe.data.datasets import load_fitted, load_images
from vit2dpe.data.settings import DataConfig
from vit2dpe.errors import ConfigError, DataError


def png(value, size=(6, 4)):
    data = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(data, "PNG")
    return data.getvalue()


def archive(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_one_tar_a_split(tmp_path):
    # The layouts of timm, of Tiny-ImageNet and of a plain folder in one; names that would climb out; a link.
    archive(
        tmp_path / "train.tar",
        {
            "x/a/1.png": png(1),
            "x/b/images/1.png": png(2),
            "../../a/2.png": png(3),
            "a/link.png": None,
            "a/._1.png": b"x",
        },
    )
    archive(tmp_path / "val.tar.gz", {"a/1.png": png(4), "b/1.png": png(5), "readme.txt": b"hello"}, "w:gz")
    data = load_images("tar", tmp_path)
    assert data.classes == ("a", "b")
    assert data.train.images[:, 0, 0, 0].tolist() == [1, 3, 2]
    assert data.train.labels.tolist() == [0, 0, 1]
    assert data.test.images[:, 0, 0, 0].tolist() == [4, 5]
    assert data.native == (4, 6)
    assert not (tmp_path.parent / "a").exists()
    assert load_images("tar", tmp_path).digest == data.digest
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_train_alone_where_a_part_of_it_is_held_out(tmp_path):
    archive(tmp_path / "train.tar", {f"{name}/{i}.png": png(i) for name in "ab" for i in range(4)})
    data = load_images("tar", tmp_path, val_fraction=0.25)
    assert (len(data.train), len(data.test), data.val) == (6, 2, None)
    assert any("2 of 8 images, 0.2 of every class" in note for note in load_images("tar", tmp_path).notes)


@pytest.mark.need("D3")
def test_archives_of_splits_by_their_usual_names(tmp_path):
    members = {f"{name}/{i}.png": png(i) for name in "ab" for i in range(2)}
    for name in ("Training", "valid", "test"):
        archive(tmp_path / f"{name}.tar", {f"{k[:-4]}{name}.png": png(len(name) + i) for i, k in enumerate(members)})
    data = load_images("tar", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (4, 4, 4)
    assert data.val.images[0, 0, 0, 0] == 5
    (tmp_path / "val.tgz").write_bytes((tmp_path / "valid.tar").read_bytes())
    with pytest.raises(DataError, match=r"has val\.tgz and valid\.tar: which is the split val\?"):
        load_images("tar", tmp_path)


def test_what_no_tar_can_be_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no archive of a split.*train\.tar"):
        load_images("tar", tmp_path)
    archive(tmp_path / "val.tar", {"a/1.png": png(1), "b/1.png": png(2)})
    with pytest.raises(DataError, match=r"holds val\.tar;"):
        load_images("tar", tmp_path)
    (tmp_path / "val.tar").rename(tmp_path / "train.tar")
    (tmp_path / "val.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:700])
    with pytest.raises(DataError, match="cannot unpack"):
        load_images("tar", tmp_path)
    archive(tmp_path / "val.tar", {"1.png": png(1)})
    with pytest.raises(DataError, match=r"1\.png is in no class folder"):
        load_images("tar", tmp_path)
    with pytest.raises(DataError, match="where"):
        load_images("tar")


class Rows(list):
    features = None


def hub(monkeypatch, splits, names=("cat", "dog"), columns=None):
    """A stand-in for the package `datasets`, which the tests do not install."""
    kinds = {"Image": type("Image", (), {}), "ClassLabel": type("ClassLabel", (), {"names": list(names)})}
    kinds["Value"] = type("Value", (), {})
    made = {}
    for split, rows in splits.items():
        made[split] = Rows(rows)
        columns = columns or {"img": "Image", "label": "ClassLabel"}
        made[split].features = {column: kinds[kind]() for column, kind in columns.items()}
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name: made
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_dataset_of_the_hub(monkeypatch):
    rows = [{"img": Image.fromarray(np.full((4, 6), v, np.uint8)), "label": v % 2} for v in range(4)]
    hub(monkeypatch, {"train": rows, "test": rows[:2], "validation": rows[:1]})
    data = load_images("hf:someone/pets")
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), len(data.test), data.native) == (4, 1, 2, (4, 6))
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(data.train.images[2], torch.full((3, 4, 6), 2, dtype=torch.uint8))
    hub(monkeypatch, {"validation": rows})
    with pytest.raises(DataError, match="has the splits validation: it takes train"):
        load_images("hf:someone/pets")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_images("hf:someone/pets")
    with pytest.raises(ConfigError, match="hf:<name>"):
        load_images("hf:")


@pytest.mark.need("D8")
@pytest.mark.parametrize(("split", "word"), [("train", "training"), ("test", "held-out")])
@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_are_no_class_are_refused_before_anything_is_trained(monkeypatch, split, word, label):
    """Test sets of the hub have -1 for every image, where their labels are kept secret."""
    rows = [{"img": Image.fromarray(np.full((4, 6), v, np.uint8)), "label": v % 2} for v in range(4)]
    splits = {"train": rows, "test": rows} | {split: [rows[0], *({**row, "label": label} for row in rows[1:])]}
    hub(monkeypatch, splits)
    with pytest.raises(
        DataError, match=rf"3 of the 4 labels of hf:someone/pets's {word} images.*2 classes.*{label}, of image 1"
    ):
        load_images("hf:someone/pets")
    with pytest.raises(DataError, match="are none of its 2 classes"):
        load_images("hf:someone/pets", limit_train=1, limit_test=1, val_fraction=0.5)


@pytest.mark.need("D8")
def test_a_validation_split_is_taken_before_a_test_split_without_labels(monkeypatch):
    rows = [{"img": Image.fromarray(np.full((4, 6), v, np.uint8)), "label": v % 2} for v in range(4)]
    hub(monkeypatch, {"train": rows, "test": [{**row, "label": -1} for row in rows], "validation": rows[:2]})
    assert load_images("hf:someone/pets").test.labels.tolist() == [0, 1]


PLAIN = {"photo": "Image", "mask": "Image", "target": "Value", "breed": "Value", "fine": "ClassLabel"}


def plain_rows(n=12):
    """Images of several sizes, a label of numbers, one of words, and a class label."""
    return [
        {"photo": Image.new("RGB", (20 + v, 16), (v, 0, 0)), "mask": Image.new("L", (8, 8), v), "target": 10 - v % 3,
         "breed": ("pug", "collie")[v % 2], "fine": v % 2}
        for v in range(n)
    ]  # fmt: skip


@pytest.mark.need("D20b")
def test_train_alone_with_labels_of_numbers_or_words(monkeypatch):
    hub(monkeypatch, {"train": plain_rows()}, columns={k: v for k, v in PLAIN.items() if k != "fine"})
    data = load_images("hf:someone/pets", source_size=(8, 8))
    assert (data.classes, len(data.train), len(data.test), data.native) == (("8", "9", "10"), 9, 3, (8, 8))
    data = load_images("hf:someone/pets?label=breed", source_size=(8, 8))
    assert data.classes == ("collie", "pug")
    assert data.train.labels.bincount().tolist() == [5, 5]


@pytest.mark.need("D20b")
def test_chosen_columns_and_sizes_that_differ(monkeypatch):
    hub(monkeypatch, {"train": plain_rows()}, columns=PLAIN)
    data, found = load_fitted(DataConfig(name="hf:someone/pets", fit="pad"), 0, lambda _: ((16, 16),))
    assert (data.classes, data.native, found.short, found.mixed) == (("cat", "dog"), (16, 16), 16, True)
    data = load_images("hf:someone/pets?image=mask&label=target")
    assert (data.classes, data.native) == (("8", "9", "10"), (8, 8))
    for query, message in (
        ("label=colour", "label=<column> chooses"),
        ("colour=x", "colour is none of image and label"),
    ):
        with pytest.raises(DataError, match=message):
            load_images(f"hf:someone/pets?{query}")
    rows = plain_rows()
    hub(monkeypatch, {"train": rows, "test": [{**rows[0], "breed": "yak"}]}, columns=PLAIN)
    with pytest.raises(DataError, match=r"those of train alone: it has 2 in train, and \['yak'\] elsewhere"):
        load_images("hf:someone/pets?label=breed", source_size=(8, 8))


@pytest.mark.need("D9")
def test_images_of_the_hub_without_labels(monkeypatch):
    hub(
        monkeypatch,
        {"train": [{"photo": Image.new("RGB", (8, 8), (v, 0, 0))} for v in range(20)]},
        columns={"photo": "Image"},
    )
    assert load_images("hf:someone/pets", labels=False).classes == ()
    with pytest.raises(DataError, match="it takes one Image and one ClassLabel"):
        load_images("hf:someone/pets")
