"""Every source that `load_images` knows: the digits of scikit-learn, CIFAR-10's own files, real images in folders."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10

from tests.data.pictures import refused
from tests.helpers import loaded_modules
from vit2dpe.data.datasets import SOURCES, load_images
from vit2dpe.errors import ConfigError, DataError


class TestDigits:
    def test_contents(self) -> None:
        loaded = load_images("digits")
        assert (len(loaded.train), len(loaded.test), loaded.native) == (1437, 360, (8, 8))
        assert loaded.classes == tuple("0123456789")
        for part in (loaded.train, loaded.test):
            assert part.images.shape[1:] == (1, 8, 8)
            assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
            share = part.labels.bincount() / len(part)
            assert (share - 0.1).abs().max() < 0.005  # stratified
        assert loaded.train.images.max() == 255
        assert loaded.digest == load_images("digits").digest
        assert len(load_images("digits", limit_train=100, limit_test=20).test) == 20

    def test_all_digits_once_with_their_own_values(self) -> None:
        from sklearn.datasets import load_digits

        loaded, original = load_images("digits"), load_digits()
        mine = torch.cat([loaded.train.images, loaded.test.images]).flatten(1).numpy()
        labels = torch.cat([loaded.train.labels, loaded.test.labels]).numpy()
        theirs = np.round(original.data * 255 / 16)
        assert sorted(map(tuple, np.c_[mine, labels])) == sorted(map(tuple, np.c_[theirs, original.target]))

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match=re.escape('pip install -e ".[recipes]"')):
            load_images("digits")

    def test_settings_it_cannot_use(self) -> None:
        with pytest.raises(ConfigError, match="leave out root"):
            load_images("digits", "/somewhere")
        with pytest.raises(ConfigError, match="source_size"):
            load_images("digits", source_size=(16, 16))


class TestCifar10:
    @pytest.fixture
    def batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """CIFAR-10's own files with 4 images a batch, as torchvision finds them after a download."""
        folder = tmp_path / "cifar" / CIFAR10.base_folder
        folder.mkdir(parents=True)

        def write(name: str, content: dict[str, object]) -> str:
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        lists = []
        for names in (CIFAR10.train_list, CIFAR10.test_list):
            lists.append([])
            for name, _ in names:
                rows = np.random.default_rng(len(name)).integers(0, 256, (4, 3072), dtype=np.uint8)
                lists[-1].append([name, write(name, {"data": rows, "labels": [3, 1, 4, 1]})])
        md5 = write("batches.meta", {"label_names": [*"abcdefghij"]})
        monkeypatch.setattr(CIFAR10, "train_list", lists[0])
        monkeypatch.setattr(CIFAR10, "test_list", lists[1])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
        return folder

    def test_contents(self, batches: Path) -> None:
        loaded = load_images("cifar10", batches.parent)
        assert (len(loaded.train), len(loaded.test), loaded.native) == (20, 4, (32, 32))
        assert loaded.classes == tuple("abcdefghij")
        assert (loaded.train.images.dtype, loaded.train.labels.dtype) == (torch.uint8, torch.int64)
        assert loaded.test.labels.tolist() == [3, 1, 4, 1]
        stored = pickle.loads((batches / "test_batch").read_bytes())["data"].reshape(4, 3, 32, 32)
        assert np.array_equal(loaded.test.images.numpy(), stored)

    def test_no_network(self, batches: Path) -> None:
        (batches / "data_batch_1").unlink()
        with pytest.raises(DataError) as caught:
            load_images("cifar10", batches.parent)
        for part in ("torchvision.datasets.CIFAR10", str(batches.parent), "refused", "--data folder --root"):
            assert part in str(caught.value)

    def test_altered_batch_is_not_opened(self, batches: Path, tmp_path: Path) -> None:
        sentinel = tmp_path / "opened"

        class Payload:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(sentinel),)

        (batches / "test_batch").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(DataError, match="CIFAR-10"):
            load_images("cifar10", batches.parent)
        assert not sentinel.exists()

    def test_cache_folder_is_the_default(self, batches: Path, cache: Path) -> None:
        cache.mkdir()
        os.rename(batches.parent, cache / "cifar10")
        assert len(load_images("cifar10").train) == 20

    def test_source_size_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="source_size"):
            load_images("cifar10", source_size=(16, 16))


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match="unknown data source 'digit'; did you mean 'digits'"):
        load_images("digit")
    assert {"digits", "folder", "csv", "cifar10", "cifar100", "tar", "hf"} == set(SOURCES)


def test_import_is_light() -> None:
    assert loaded_modules("import vit2dpe.data.datasets", {"timm", "sklearn", "torchvision", "matplotlib"}) == []


class TestRealData:
    def unpack(self, archive: Path, target: Path, classes: int, each: int) -> Path:
        """The first `each` images of the first `classes` of both splits, written by hand; returns the root."""
        kept: dict[tuple[str, str], int] = {}
        with tarfile.open(archive) as tar:
            for member in tar:
                top, *rest = Path(member.name).parts
                if not member.isfile() or len(rest) != 3:
                    continue
                part, name, _ = rest
                if (part, name) not in kept and sum(key[0] == part for key in kept) == classes:
                    if len(kept) == 2 * classes and min(kept.values()) == each:
                        break
                    continue
                if kept.setdefault((part, name), 0) < each:
                    kept[part, name] += 1
                    (target / top / part / name).mkdir(parents=True, exist_ok=True)
                    (target / member.name).write_bytes(tar.extractfile(member).read())
        return target / top

    def test_cifar10(self, shared_data: Path, tmp_path: Path) -> None:
        loaded = load_images("folder", self.unpack(shared_data / "cifar10.tar.gz", tmp_path, classes=3, each=20))
        assert loaded.classes == ("airplane", "automobile", "bird")
        assert (len(loaded.train), len(loaded.test), loaded.native) == (60, 60, (32, 32))
        assert max(abs(m - known) for m, known in zip(loaded.mean, (0.49, 0.48, 0.45), strict=True)) < 0.1
        with Image.open(tmp_path / "cifar10/test/bird/0019.jpg") as last:
            assert np.array_equal(loaded.test.images[-1].permute(1, 2, 0).numpy(), np.asarray(last))
        assert len(loaded.notes) == 1  # where the cache is, and nothing to complain of

    def test_tiny_imagenet(self, shared_data: Path, tmp_path: Path) -> None:
        loaded = load_images("folder", self.unpack(shared_data / "tiny-imagenet-50.tar.gz", tmp_path, 2, 50))
        assert (len(loaded.train), len(loaded.test), loaded.native) == (100, 100, (64, 64))
        gray = [note for note in loaded.notes if note.startswith("grayscale images converted to RGB: ")]
        assert len(gray) == 1

    def test_photos(self, shared_data: Path, tmp_path: Path) -> None:
        """Native sizes, one of them grayscale."""
        files = sorted((shared_data / "photos").glob("*.JPEG"))
        assert len(files) == 24
        for index, file in enumerate(files):
            target = tmp_path / "photos" / ("train", "val")[index % 2] / f"class{index // 2 % 2}" / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
        refused(tmp_path / "photos", "differ in size", "source_size")
        loaded = load_images("folder", tmp_path / "photos", source_size=(96, 160))
        assert (len(loaded.train), len(loaded.test), loaded.native) == (12, 12, (96, 160))
        assert "grayscale images converted to RGB: 1" in loaded.notes
        first = sorted((tmp_path / "photos/train/class0").iterdir())[0]
        with Image.open(first) as photo:
            expected = ImageOps.fit(photo.convert("RGB"), (160, 96), Image.Resampling.BICUBIC)
        assert np.array_equal(loaded.train.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
