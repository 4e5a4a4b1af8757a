"""Folders of classes and Tiny-ImageNet's: what is read, and what is refused with the path and what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.pictures import pixels, refused, save
from vit2dpe.data.datasets import load_images


class TestFolder:
    def test_contents(self, root: Path) -> None:
        loaded = load_images("folder", root)
        assert loaded.name == "folder"
        assert loaded.classes == ("cat", "dog")
        assert loaded.native == (6, 8)
        assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert loaded.test.labels.tolist() == [0, 0, 1, 1]
        for part, seeds in ((loaded.train, range(6)), (loaded.test, range(6, 10))):
            expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in seeds])
            assert np.array_equal(part.images.numpy(), expected)
            assert part.labels.dtype == torch.int64

    def test_statistics_are_those_of_train_in_float64(self, root: Path) -> None:
        loaded = load_images("folder", root)
        train = loaded.train.images.numpy().astype(np.float64) / 255
        np.testing.assert_allclose(loaded.mean, train.mean((0, 2, 3)), rtol=1e-14)
        np.testing.assert_allclose(loaded.std, train.std((0, 2, 3)), rtol=1e-14)

    def test_a_constant_channel_has_a_std_that_can_be_divided_by(self, root: Path) -> None:
        for file in root.glob("train/*/*.png"):
            flat = np.array(Image.open(file))
            flat[..., 1] = 51
            save(file, flat)
        loaded = load_images("folder", root)
        assert loaded.mean[1] == pytest.approx(0.2, abs=1e-15)
        assert loaded.std[1] == 1.0

    def test_order_does_not_depend_on_the_disk(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = load_images("folder", root).digest
        scandir = os.scandir

        class Backwards:
            def __init__(self, path: Path) -> None:
                self.entries = list(scandir(path))[::-1]

            def __enter__(self) -> list[os.DirEntry[str]]:
                return self.entries

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(os, "scandir", Backwards)
        assert load_images("folder", root).digest == expected

    def test_digest(self, root: Path) -> None:
        first = load_images("folder", root)
        assert re.fullmatch("[0-9a-f]{64}", first.digest)
        assert load_images("folder", str(root)).digest == first.digest
        changed = pixels(7)
        changed[3, 4, 1] ^= 1  # one pixel, one bit, of a test image
        save(root / "val/cat/1.png", changed)
        assert load_images("folder", root).digest != first.digest
        save(root / "val/cat/1.png", pixels(7))
        assert load_images("folder", root).digest == first.digest

    def test_digest_sees_labels(self, root: Path) -> None:
        first = load_images("folder", root).digest
        os.rename(root / "val/cat/1.png", root / "val/dog/!.png")  # the images keep their order
        assert load_images("folder", root).digest != first

    def test_limits(self, root: Path) -> None:
        loaded = load_images("folder", root, limit_train=4, limit_test=2)
        assert loaded.train.labels.tolist() == [0, 0, 1, 1]
        assert loaded.test.labels.tolist() == [0, 1]
        assert loaded.digest != load_images("folder", root).digest

    def test_same_image_in_both_splits_is_told(self, root: Path) -> None:
        assert not [note for note in load_images("folder", root).notes if "same image" in note]
        for name, image in (("cat/8.png", pixels(0)), ("dog/8.png", pixels(0)), ("dog/9.png", pixels(5))):
            save(root / "val" / name, image)
        assert "same image in train and test: 3" in load_images("folder", root).notes

    def test_hidden_entries_are_not_classes_nor_images(self, root: Path) -> None:
        expected = load_images("folder", root).digest
        for hidden in ("train/.ipynb_checkpoints/0.png", "val/__MACOSX/0.png", "train/cat/._0.png"):
            save(root / hidden, pixels(99))
        (root / "train/.DS_Store").write_text("x")
        (root / "train/cat/.ipynb_checkpoints").mkdir()
        loaded = load_images("folder", root)
        assert loaded.classes == ("cat", "dog")
        assert loaded.digest == expected

    def test_other_files_are_told(self, root: Path) -> None:
        (root / "train/cat/LICENSE.txt").write_text("x")
        (root / "train/cat/0.heic").write_text("x")
        (root / "train/README").write_text("beside the classes")
        expected = f"files in {root / 'train/cat'} that are no images by their name, ignored: 2 (1 of them .heic: "
        expected += "they are read once pillow-heif is installed)"
        assert expected in load_images("folder", root).notes

    def test_upper_case_names(self, root: Path) -> None:
        save(root / "train/cat/A.PNG", pixels(50))
        assert len(load_images("folder", root).train) == 7

    def test_paths_with_spaces_and_accents(self, root: Path) -> None:
        os.rename(root, root.with_name("més cães 犬"))
        assert len(load_images("folder", root.with_name("més cães 犬")).train) == 6

    def test_test_serves_where_there_is_no_val(self, root: Path) -> None:
        expected = load_images("folder", root).digest
        os.rename(root / "val", root / "test")
        assert load_images("folder", root).digest == expected


class TestLayoutFaults:
    def test_no_root(self, tmp_path: Path) -> None:
        refused(None, "--root", "train/<class>")
        refused(tmp_path / "nowhere", tmp_path / "nowhere", "train/<class>")
        (tmp_path / "file").write_text("x")
        refused(tmp_path / "file", tmp_path / "file")

    def test_no_train(self, root: Path) -> None:
        os.rename(root / "train", root / "test")
        refused(root, f"there is no folder {root / 'train'} beside val, test", "expected <root>/<class>")

    def test_empty_class(self, root: Path) -> None:
        (root / "train/bird").mkdir()
        refused(root, root / "train/bird", "holds no image", "delete the folder")
        (root / "train/bird/notes.txt").write_text("x")
        refused(root, root / "train/bird", "holds no image")

    def test_empty_class_of_val(self, root: Path) -> None:
        for file in (root / "val/cat").iterdir():
            file.unlink()
        refused(root, root / "val/cat", "holds no image")

    def test_class_that_train_has_not(self, root: Path) -> None:
        save(root / "val/yak/0.png", pixels(9))
        refused(root, root / "val", "classes that train has not: yak (1 in all)", "add them to train")

    def test_class_missing_in_val(self, root: Path) -> None:
        save(root / "train/ant/0.png", pixels(9))
        refused(root, root / "val", "lacks classes of train: ant (1 in all)", "add images")

    def test_one_class(self, root: Path) -> None:
        for part in ("train", "val"):
            os.rename(root / part / "dog", root / f"{part}-dog")
        refused(root, root / "train", "one class (cat)", "two or more")

    def test_images_outside_classes(self, root: Path) -> None:
        save(root / "train/stray.png", pixels(9))
        refused(root, root / "train/stray.png", "in no class folder")

    def test_no_classes(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            (tmp_path / "flat" / part).mkdir(parents=True)
        refused(tmp_path / "flat", tmp_path / "flat/train", "no class folders", "train/<class>/<image>")

    def test_folders_in_a_class(self, root: Path) -> None:
        save(root / "train/cat/persian/0.png", pixels(9))
        refused(root, root / "train/cat", "holds folders (persian)")


class TestTinyImageNet:
    @pytest.fixture
    def tiny(self, root: Path) -> Path:
        """The pets again, laid out as Tiny-ImageNet is downloaded."""
        lines = []
        for name in ("cat", "dog"):
            os.rename(root / "train" / name, root / "moved")
            (root / "train" / name).mkdir()
            os.rename(root / "moved", root / "train" / name / "images")
            (root / "train" / name / f"{name}_boxes.txt").write_text("0.png\t0\t0\t5\t5\n")
        (root / "val/images").mkdir()
        for name in ("dog", "cat"):  # val is not sorted by class
            for index in range(2):
                file = f"val_{len(lines)}.png"
                os.rename(root / "val" / name / f"{index}.png", root / "val/images" / file)
                lines.append(f"{file}\t{name}\t0\t0\t5\t5\n")
            (root / "val" / name).rmdir()
        (root / "val/val_annotations.txt").write_text("".join(lines))
        save(root / "test/images/test_0.png", pixels(70))
        return root

    def test_read_as_class_folders_are(self, tiny: Path) -> None:
        loaded = load_images("folder", tiny)
        assert loaded.classes == ("cat", "dog")
        assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert loaded.test.labels.tolist() == [0, 0, 1, 1]
        expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in range(6, 10)])
        assert np.array_equal(loaded.test.images.numpy(), expected)

    def test_unnamed_image(self, tiny: Path) -> None:
        save(tiny / "val/images/val_9.png", pixels(9))
        refused(tiny, "val_annotations.txt", "the same files", "val/images/val_9.png")

    def test_missing_image(self, tiny: Path) -> None:
        (tiny / "val/images/val_1.png").unlink()
        refused(tiny, "val_annotations.txt", "val/images/val_1.png")

    def test_image_named_twice(self, tiny: Path) -> None:
        with (tiny / "val/val_annotations.txt").open("a") as file:
            file.write("val_0.png\tcat\t0\t0\t5\t5\n")
        refused(tiny, "once each", "val/images/val_0.png")

    def test_broken_line(self, tiny: Path) -> None:
        (tiny / "val/val_annotations.txt").write_text("val_0.png dog\n")
        refused(tiny, tiny / "val/val_annotations.txt", "line 1", "<file> <tab> <class>", "val_0.png dog")

    def test_class_that_train_has_not(self, tiny: Path) -> None:
        file = tiny / "val/val_annotations.txt"
        file.write_text(file.read_text().replace("val_0.png\tdog", "val_0.png\tyak"))
        refused(tiny, "classes that train has not: yak")
