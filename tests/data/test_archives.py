"""One tar a split, and Hugging Face's datasets."""

import io
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image

from vit2dpe.data.datasets import load_images
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
    with pytest.raises(DataError, match=r"holds train\.tar; .* --data\.val_fraction 0\.1 holds out"):
        load_images("tar", tmp_path)
    data = load_images("tar", tmp_path, val_fraction=0.25)
    assert (len(data.train), len(data.test), data.val) == (6, 2, None)


def test_what_no_tar_can_be_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no archive of a split.*train\.tar"):
        load_images("tar", tmp_path)
    archive(tmp_path / "train.tar", {"a/1.png": png(1), "b/1.png": png(2)})
    with pytest.raises(DataError, match=r"holds train\.tar;"):
        load_images("tar", tmp_path)
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


def hub(monkeypatch, splits, names=("cat", "dog")):
    """A stand-in for the package `datasets`, which the tests do not install."""
    kinds = {"Image": type("Image", (), {}), "ClassLabel": type("ClassLabel", (), {"names": list(names)})}
    made = {}
    for split, rows in splits.items():
        made[split] = Rows(rows)
        made[split].features = {"img": kinds["Image"](), "label": kinds["ClassLabel"]()}
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name: made
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_dataset_of_the_hub(monkeypatch):
    rows = [{"img": Image.fromarray(np.full((4, 6), v, np.uint8)), "label": v % 2} for v in range(4)]
    hub(monkeypatch, {"train": rows, "test": rows[:2], "validation": rows[:1]})
    data = load_images("hf:someone/pets")
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test), data.native) == (4, 1, (4, 6))
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(data.train.images[2], torch.full((3, 4, 6), 2, dtype=torch.uint8))
    hub(monkeypatch, {"train": rows})
    with pytest.raises(DataError, match="has the splits train"):
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
