"""Where images may lie: splits by their usual names, class folders alone, a wrapping folder, images without classes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.data.pictures import pixels, refused, save
from vit2dpe.data.datasets import load_images
from vit2dpe.data.layout import list_folders, list_held_out
from vit2dpe.errors import ConfigError, DataError


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """Class folders alone: 10 cats and 20 dogs."""
    for label, (name, count) in enumerate((("cat", 10), ("dog", 20))):
        for index in range(count):
            save(tmp_path / "alone" / name / f"{index}.png", pixels(100 * label + index))
    return tmp_path / "alone"


def notes_of(root: Path, *parts: object) -> str:
    """The note that has all the parts, of which there is one."""
    (note,) = [note for note in load_images("folder", root).notes if all(str(part) in note for part in parts)]
    return note


@pytest.mark.need("D3")
@pytest.mark.parametrize("name", ["val", "valid", "Validation", "DEV", "test", "Testing"])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_a_held_out_split_is_found_by_its_usual_names(root: Path, name: str, train: str) -> None:
    expected = load_images("folder", root)
    os.rename(root / "val", root / name)
    os.rename(root / "train", root / train)
    loaded = load_images("folder", root)
    assert (loaded.digest, loaded.val) == (expected.digest, None)
    assert [note for note in loaded.notes if "is read as" in note] == (
        [] if (name, train) in {("val", "train"), ("test", "train")} else list(loaded.notes[:1])
    )


@pytest.mark.need("D3")
@pytest.mark.parametrize("name", ["val", "valid"])
def test_of_three_splits_one_decides_and_the_other_is_measured(root: Path, name: str) -> None:
    os.rename(root / "val", root / name)
    for index in range(3):
        for label in ("cat", "dog"):
            save(root / "test" / label / f"{index}.png", pixels(60 + index))
    loaded = load_images("folder", root)
    assert loaded.val is not None
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (6, 4, 6)
    assert next(iter(loaded.held_out)) == "val"
    assert torch.equal(loaded.val.pixels(torch.tensor([0])), torch.from_numpy(pixels(6).transpose(2, 0, 1))[None])
    assert "the first decides which weights are best" in notes_of(root, f"has {name} and test")
    assert list_held_out(root)[1]["cat"][0] == "test/cat/0.png"
    with pytest.raises(ConfigError, match=r"split of its own for validation \(4 images\): leave out val_fraction"):
        load_images("folder", root, val_fraction=0.5)


@pytest.mark.need("D3")
def test_two_folders_of_one_split_are_refused(root: Path) -> None:
    save(root / "valid/cat/0.png", pixels(70))
    refused(root, "val and valid", "which is the split val?")


@pytest.mark.need("D11")
def test_class_folders_alone_are_split(alone: Path) -> None:
    loaded = load_images("folder", alone, seed=3)
    assert loaded.classes == ("cat", "dog")
    assert (loaded.train.labels.bincount().tolist(), loaded.test.labels.bincount().tolist()) == ([8, 16], [2, 4])
    whole = {image.numpy().tobytes() for split in (loaded.train, loaded.test) for image in split.images}
    assert len(whole) == 30
    assert load_images("folder", alone, seed=3).digest == loaded.digest != load_images("folder", alone).digest
    assert "6 of 30 images, 0.2 of every class, are held out by seed 0" in notes_of(alone, "no held-out split")
    assert load_images("folder", alone, seed=3, limit_train=4).test.labels.tolist() == loaded.test.labels.tolist()
    assert load_images("folder", alone, val_fraction=0.5).test.labels.bincount().tolist() == [5, 10]


@pytest.mark.need("D11")
def test_train_alone_is_split_too(alone: Path, tmp_path: Path) -> None:
    expected = load_images("folder", alone).digest
    os.rename(alone, tmp_path / "train")
    (tmp_path / "only").mkdir()
    os.rename(tmp_path / "train", tmp_path / "only/train")
    assert load_images("folder", tmp_path / "only").digest == expected


def test_a_wrapping_folder_is_looked_into(alone: Path, tmp_path: Path) -> None:
    expected = load_images("folder", alone).digest
    (tmp_path / "zip/inner").mkdir(parents=True)
    os.rename(alone, tmp_path / "zip/inner/alone")
    refused(tmp_path / "zip", "holds folders (alone), 1 of them")  # two are one too many
    os.rename(tmp_path / "zip/inner/alone", tmp_path / "zip/alone")
    (tmp_path / "zip/inner").rmdir()
    assert load_images("folder", tmp_path / "zip").digest == expected
    assert notes_of(tmp_path / "zip", "the only folder")


def test_a_class_in_a_folder_of_its_own_is_read(alone: Path) -> None:
    expected = load_images("folder", alone).digest
    os.rename(alone / "cat", alone / "photos")
    (alone / "cat").mkdir()
    os.rename(alone / "photos", alone / "cat/photos")
    assert load_images("folder", alone).digest == expected
    save(alone / "cat/more/0.png", pixels(1))
    refused(alone, alone / "cat", "holds folders (more, photos), 2 of them, beside 0 images")


def test_a_class_that_is_called_train(alone: Path) -> None:
    os.rename(alone / "cat", alone / "train")
    assert load_images("folder", alone).classes == ("dog", "train")
    os.rename(alone / "dog", alone / "test")
    refused(alone, "10 images and no class folders")


class TestRefused:
    def test_one_class(self, alone: Path, tmp_path: Path) -> None:
        os.rename(alone / "dog", tmp_path / "dog")
        refused(alone, "one class (cat) of 10 images", "two or more")

    def test_nothing_readable(self, tmp_path: Path) -> None:
        for name in ("a/1.txt", "a/2.txt", "b/3.heic"):
            (tmp_path / "no" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "no" / name).write_text("x")
        refused(tmp_path / "no", "no image that Pillow can open", "2 of .txt")
        for file in (tmp_path / "no/a").iterdir():
            file.unlink()
        (tmp_path / "no/a").rmdir()
        refused(tmp_path / "no", "1 of .heic", "once pillow-heif is installed")

    def test_images_without_classes(self, alone: Path) -> None:
        refused(alone / "cat", "holds 10 images and no class folders", "vit2dpe pretrain takes images alone")
        save(alone / "stray.png", pixels(1))
        refused(alone, alone / "stray.png", "1 image beside 2 class folders")

    def test_a_class_of_one_image(self, alone: Path) -> None:
        save(alone / "yak/0.png", pixels(1))
        refused(alone, "1 of 3 classes have one image", "yak", "two of every class")

    def test_files_that_are_no_images(self, alone: Path) -> None:
        for file in alone.glob("*/*.png"):
            file.write_text("x")
        refused(alone, "cannot read the image")
        with pytest.raises(DataError, match="not one of 30 images"):
            load_images("folder", alone, unreadable="skip")


@pytest.mark.need("D9")
class TestImagesAlone:
    def test_one_flat_folder(self, alone: Path) -> None:
        loaded = load_images("folder", alone / "dog", labels=False)
        assert (loaded.classes, len(loaded.train), len(loaded.test)) == ((), 18, 2)
        assert "images without classes" in loaded.notes[0]

    def test_any_tree(self, alone: Path) -> None:
        save(alone / "dog/deep/deeper/0.PNG", pixels(900))
        save(alone / "stray.png", pixels(901))
        save(alone / ".hidden/0.png", pixels(902))
        layout = list_folders(alone, labels=False)
        assert (layout.classes, len(layout.files)) == ((), 32)
        assert {"stray.png", "dog/deep/deeper/0.PNG"} <= set(layout.files)

    def test_class_folders_keep_their_classes_and_their_split(self, alone: Path) -> None:
        assert load_images("folder", alone, labels=False).digest == load_images("folder", alone).digest

    def test_splits_of_images(self, alone: Path) -> None:
        os.rename(alone / "cat", alone / "valid")
        os.rename(alone / "dog", alone / "train")
        loaded = load_images("folder", alone, labels=False)
        assert (len(loaded.train), len(loaded.test), loaded.classes) == (20, 10, ())

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "none/a").mkdir(parents=True)
        with pytest.raises(DataError, match="holds no image that can be read: it is empty"):
            load_images("folder", tmp_path / "none", labels=False)
