"""TensorBoard's and W&B's own readers find the numbers of metrics.csv in what a run writes for them."""

import json
import re
import sys
import types
from dataclasses import replace

import pytest

from tests.training.test_train import MICRO, at
from vit2dpe.errors import ConfigError
from vit2dpe.training.log import Trackers, read_table
from vit2dpe.training.objectives.images import train


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(at(MICRO, tmp_path, tensorboard=True))
    train(replace(at(MICRO, tmp_path, tensorboard=True), resume=True, optim=replace(MICRO.optim, epochs=3)))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = read_table(out / "metrics.csv")
    assert {"train_loss", "test_top1", "test_top5", "lr", "images_per_s"} <= set(events.Tags()["scalars"])
    for name in ("train_loss", "test_top1", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [row["step"] for row in rows] == [2, 4, 6], "a resumed run goes on"
        assert [value for _, value in found] == pytest.approx([row[name] for row in rows], rel=1e-6)


def records(content):
    """Of a .wandb file: LevelDB's log format behind seven bytes; 32 KiB blocks, (crc, length, type) before a piece."""
    at, piece, whole = 7, b"", 1
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for another piece
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (whole, 4):  # 2 and 3 are the first and a middle piece of several
            yield piece
            piece = b""


def test_wandb_keeps_what_was_logged(tmp_path, monkeypatch):
    """Offline: nothing leaves the machine; the file that would be sent later is read back."""
    from wandb.proto import wandb_internal_pb2

    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off").items():
        monkeypatch.setenv(name, value)
    out = train(at(MICRO, tmp_path / "a run: 1", wandb="micro"))
    (path,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    assert re.fullmatch(r"run-a_run_1-[0-9a-f]{8}\.wandb", path.name)
    logged, told = [], {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            logged.append((int(items["step"]), float(items["train_loss"])))
        if record.HasField("run"):
            told |= {item.key: item.value_json for item in record.run.config.update}
    assert logged == [(row["step"], pytest.approx(row["train_loss"])) for row in read_table(out / "metrics.csv")]
    assert json.loads(told["optim"])["batch_size"] == 32


@pytest.fixture
def runs(monkeypatch):
    """What `wandb.init` is called with, instead of W&B."""
    calls = []
    module = types.ModuleType("wandb")
    module.init = lambda **given: (
        calls.append(given) or types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.need("D4")
def test_folders_of_one_name_are_runs_of_their_own_and_a_resumed_one_is_the_same(tmp_path, runs):
    for folder in ("a", "b"):
        train(at(MICRO, tmp_path / folder / "train", wandb="micro"))
    train(
        replace(at(MICRO, tmp_path / "a" / "train", wandb="micro"), resume=True, optim=replace(MICRO.optim, epochs=3))
    )
    ids = [given["id"] for given in runs]
    assert ids[0] != ids[1]
    assert ids[2] == ids[0] == (tmp_path / "a" / "train" / "wandb_id").read_text()
    assert [given["name"] for given in runs] == ["train"] * 3
    assert all(re.fullmatch(r"[\w.-]{1,64}", one) for one in ids)


@pytest.mark.need("D4")
def test_an_id_is_new_for_another_training_in_a_folder_and_that_of_before_for_older_versions(tmp_path, runs):
    folder = tmp_path / ("a long name, " * 9)
    folder.mkdir()
    for resume in (False, False, True):
        Trackers(folder, False, "micro", {}, resume)
    first, second, third = (given["id"] for given in runs)
    assert first != second == third
    assert len(first) == 64
    (folder / "wandb_id").unlink()
    (folder / "wandb").mkdir()
    Trackers(folder, False, "micro", {}, resume=True)
    assert runs[-1]["id"] == re.sub(r"[^\w.-]+", "_", folder.name)[:64]


@pytest.mark.parametrize(
    ("setting", "value", "module"), [("tensorboard", True, "torch.utils.tensorboard"), ("wandb", "x", "wandb")]
)
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, setting, value, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"run\.{setting} needs it installed.*pip install .*\[tracking\]"):
        train(at(MICRO, tmp_path, **{setting: value}))
