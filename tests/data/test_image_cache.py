"""Decoded images are kept in a file: read once, rebuilt after any change or damage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.data.pictures import pixels, save
from vit2dpe.data import image_cache as images
from vit2dpe.data.datasets import load_images


class TestCache:
    @pytest.fixture
    def decodings(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """One entry for every time that the files are decoded."""
        calls: list[object] = []
        real = images.decode_all
        monkeypatch.setattr(images, "decode_all", lambda *args: calls.append(args) or real(*args))
        return calls

    def files(self, folder: Path) -> list[Path]:
        return sorted(file for file in folder.rglob("*") if file.is_file())

    def test_second_load_decodes_nothing(self, root: Path, cache: Path, decodings: list[object]) -> None:
        before = self.files(root)
        first = load_images("folder", root)
        (file,) = self.files(cache)
        assert file.suffix == ".safetensors"
        assert first.notes == (f"decoded images are cached in {file}",)
        second = load_images("folder", root, limit_train=4)
        assert len(decodings) == 1
        assert second.notes == ()
        assert self.files(root) == before  # nothing is left in the user's folder
        assert load_images("folder", root).digest == first.digest

    def test_what_was_loaded_can_be_written_to(self, root: Path) -> None:
        first = load_images("folder", root)
        load_images("folder", root).train.images.zero_()
        assert load_images("folder", root).digest == first.digest

    def test_sizes_are_kept_apart(self, root: Path, cache: Path, decodings: list[object]) -> None:
        for size in (None, (4, 4), (4, 5), None, (4, 4)):
            assert load_images("folder", root, source_size=size).native == (size or (6, 8))
        assert len(decodings) == len(self.files(cache)) == 3

    def test_any_change_is_noticed(self, root: Path, decodings: list[object]) -> None:
        load_images("folder", root)
        os.utime(root / "train/cat/0.png", (1, 1))
        load_images("folder", root)
        os.rename(root / "train/cat/0.png", root / "train/cat/00.png")
        load_images("folder", root)
        save(root / "train/cat/9.png", pixels(80))
        load_images("folder", root)
        assert len(decodings) == 4

    def test_change_behind_the_same_size_and_time_is_noticed(self, root: Path) -> None:
        path = save(root / "train/cat/x.bmp", pixels(80))
        first, stat = load_images("folder", root), path.stat()
        save(path, pixels(81))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert load_images("folder", root).digest != first.digest

    @pytest.mark.parametrize("damage", ["cut", "empty", "junk", "flip", "count"])
    def test_damaged_cache_is_rebuilt(self, root: Path, cache: Path, decodings: list[object], damage: str) -> None:
        save(root / "train/cat/gray.png", pixels(30)[..., 0])
        first = load_images("folder", root)
        (file,) = self.files(cache)
        content = file.read_bytes()
        flip = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]  # one bit of one pixel
        count = content.replace(b'RGB\\": 1', b'RGB\\": 7')  # in the header
        file.write_bytes({"cut": content[:-9], "empty": b"", "junk": b"x" * 500, "flip": flip, "count": count}[damage])
        assert file.read_bytes() != content
        again = load_images("folder", root)
        assert (again.digest, again.notes, len(decodings)) == (first.digest, first.notes, 2)
        load_images("folder", root)
        assert len(decodings) == 2
        assert self.files(cache) == [file]  # and no temporary file

    def test_cache_that_cannot_be_written(self, root: Path, cache: Path) -> None:
        cache.write_text("a file where the folder should be")
        (note,) = load_images("folder", root).notes
        assert note.startswith("decoded images are not cached: ")
        assert str(cache) in note

    def test_write_that_fails_halfway(self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(images, "save_file", full)
        assert "No space left" in load_images("folder", root).notes[0]
        assert self.files(cache) == []

    def test_no_home(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless(path: Path) -> Path:
            if str(path).startswith("~"):
                raise RuntimeError("Could not determine home directory.")
            return path

        monkeypatch.delenv("VIT2DPE_CACHE")
        monkeypatch.setattr(Path, "expanduser", homeless)
        assert "not cached: Could not determine home directory." in load_images("folder", root).notes[0]

    def test_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert images.cache_dir() == tmp_path / "cache"
        monkeypatch.delenv("VIT2DPE_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert images.cache_dir() == tmp_path / ".cache/vit2dpe"


def test_a_full_disk_keeps_nothing_and_stops_nothing(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train/cat/1.png").write_bytes(b"")
    names = [f"train/cat/{index}.png" for index in range(3)]
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert list(images.find_unreadable(root, names)) == [1]
    assert not any(path.is_file() for path in cache.rglob("*"))
    monkeypatch.setattr(os, "fsync", real)
    assert list(images.find_unreadable(root, names)) == list(images.find_unreadable(root, names)) == [1]
    assert len(list(cache.iterdir())) == 1
