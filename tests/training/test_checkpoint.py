"""What is saved is what is loaded, or the error says what happened to it."""

import json
import os
import stat

import pytest
import torch

from vit2dpe import ViT, load_run
from vit2dpe.errors import CheckpointError, TrainingError
from vit2dpe.files import sync_folder, write_atomically
from vit2dpe.training.checkpoint import save_model

ARGUMENTS = dict(
    position="learned+rope_mixed", img_size=(12, 16), patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
)


@pytest.fixture
def saved(tmp_path):
    model = ViT(**ARGUMENTS).eval()
    torch.nn.init.normal_(model.head.weight)
    save_model(tmp_path / "last", model, ARGUMENTS, classes=["a", "b", "c", "d", "e"])
    return tmp_path, model


def test_round_trip_is_bit_equal_on_a_non_square_grid(saved):
    folder, model = saved
    again = load_run(folder)
    x = torch.randn(2, 3, 12, 16)
    assert torch.equal(again(x), model(x))
    assert not again.training
    assert again.train_grid == (3, 4)
    assert again.about["classes"] == ["a", "b", "c", "d", "e"]
    assert json.loads((folder / "last/model.json").read_text())["train_grid"] == [3, 4]
    assert sorted(p.name for p in (folder / "last").iterdir()) == ["model.json", "model.safetensors"]


def test_a_flipped_byte_is_found(saved):
    folder, _ = saved
    path = folder / "last/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not what was saved"):
        load_run(folder)


def test_what_is_missing_or_too_new_is_named(saved, tmp_path):
    folder, _ = saved
    meta = folder / "last/model.json"
    text = meta.read_text()
    meta.write_text(text.replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"format 99.*upgrade"):
        load_run(folder)
    meta.write_text(text[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_run(folder)
    meta.write_text(text)
    (folder / "last/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_run(folder)
    with pytest.raises(CheckpointError, match=r"model\.json is missing"):
        load_run(tmp_path / "no such run")


def test_a_name_as_long_as_the_system_takes(tmp_path):
    path = tmp_path / ("x" * 250)
    write_atomically(path, b"whole")  # under another name first, which must not be longer
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_meanwhile_reads_what_was_there(tmp_path):
    """The new file takes the name of the old one in one moment; nothing is written into what a reader has open."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
    """Each under a name of its own until then; the last one to finish is read."""
    path, real = tmp_path / "file", os.fsync

    def meanwhile(handle):
        monkeypatch.setattr("vit2dpe.files.os.fsync", real)
        with monkeypatch.context() as other:
            other.setattr("vit2dpe.files.os.getpid", lambda: 1)
            write_atomically(path, b"theirs")
        assert path.read_bytes() == b"theirs"
        real(handle)

    monkeypatch.setattr("vit2dpe.files.os.fsync", meanwhile)
    write_atomically(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_was_synced_is_closed(tmp_path, monkeypatch):
    opened, closed, real_open, real_close = [], [], os.open, os.close
    monkeypatch.setattr(os, "open", lambda *args: (opened.append(real_open(*args)), opened[-1])[1])
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), real_close(handle))[1])
    sync_folder(tmp_path)
    sync_folder(tmp_path / "that is not there")
    assert len(opened) == 1
    assert opened == closed


def test_renames_are_made_to_last(tmp_path, monkeypatch):
    """What was written reaches the disk before it gets its name, and the folder's names do after that."""
    real, seen = os.fsync, []

    def spy(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        seen.append(("folder" if folder else "file", (tmp_path / "run/model.json").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", spy)
    save_model(tmp_path / "run", ViT(**ARGUMENTS), ARGUMENTS)
    assert seen.count(("file", False)) == 2, "weights, and the JSON that speaks of them"
    assert ("file", True) not in seen
    assert seen[-1] == ("folder", True)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vit2dpe.files.os.fsync", full)
    with pytest.raises(TrainingError, match=r"file, 3 bytes, [\d,]+ free: No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
