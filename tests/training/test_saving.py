"""Checkpoints are written beside the training: what was there at the save, one at a time, and no error is lost."""

import os
import threading
from dataclasses import replace

import pytest
import torch

from benchmarks import devtrace
from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, build, data, everything, task  # noqa: F401
from vit2dpe import ViT
from vit2dpe.errors import Stopped, TrainingError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.training import snapshots
from vit2dpe.training.checkpoint import read_meta
from vit2dpe.training.distributed import ALONE
from vit2dpe.training.engine import Trainer, fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.snapshots import Snapshots, TrainingState
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.update import Updater
from vit2dpe.training.writer import Writer

SHORT = replace(OPTIM, epochs=2)


def train(data, folder, actions):  # noqa: F811
    with after_updates(actions):
        return fit(build(), task(data), SHORT, RUN, folder=folder, spec=SPEC)


def saved_whole(trainer):
    trainer.save()
    trainer.snapshots.finish()


def test_a_slow_disk_stops_no_step_and_gets_what_was_there(data, tmp_path, monkeypatch):  # noqa: F811
    """Saved after update 2 of weights, average and moments; updates 3 and 4 are made while nothing is written."""
    with pytest.raises(Killed):
        train(data, tmp_path / "at once", {2: saved_whole, 3: die})
    gate, real = threading.Event(), snapshots.write_checkpoint

    def slow(*args, **more):
        assert threading.current_thread() is not threading.main_thread()
        assert gate.wait(60)
        real(*args, **more)

    def look(trainer):
        assert not (tmp_path / "slow/last").exists()
        gate.set()

    monkeypatch.setattr(snapshots, "write_checkpoint", slow)
    with pytest.raises(Killed):
        train(data, tmp_path / "slow", {2: Trainer.save, 4: lambda trainer: (look(trainer), die(trainer))})
    one, other = everything(tmp_path / "at once/last"), everything(tmp_path / "slow/last")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    states = [read_meta(tmp_path / run / "last")["state"] for run in ("at once", "slow")]
    assert states[0]["step"] == states[1]["step"] == 2
    assert states[0]["sums"] == states[1]["sums"]
    assert not [thread for thread in threading.enumerate() if "vit2dpe" in thread.name]


def test_one_is_written_at_a_time_and_none_is_left_out(data, tmp_path, monkeypatch):  # noqa: F811
    real, steps, busy = snapshots.write_checkpoint, [], threading.Lock()

    def watched(folder, *args, state, **more):
        assert busy.acquire(blocking=False)
        real(folder, *args, state=state, **more)
        steps.append((folder.name, state.get("step")))
        busy.release()

    monkeypatch.setattr(snapshots, "write_checkpoint", watched)
    train(data, tmp_path, dict.fromkeys((1, 2, 3), Trainer.save))
    assert [step for name, step in steps if name == "last"] == [1, 2, 3, 4, 8]
    assert steps[3][0] == "best", "before last/, which speaks of it"


def fill_disk(monkeypatch):
    """From now on what the thread writes finds no space."""
    real = os.fsync

    def full(handle):
        if "vit2dpe" in threading.current_thread().name:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize(("filled", "kept"), [(1, 1), (8, 4)], ids=["at the next save", "at the end"])
def test_a_full_disk_ends_the_training_and_keeps_what_was_there(filled, kept, data, tmp_path, monkeypatch):  # noqa: F811
    """Updates 1 and 2 are saved, and the end of each epoch, which has four: the error is raised by the save behind."""
    reached = []
    with monkeypatch.context() as patch:
        actions = {n: lambda trainer: reached.append(trainer.state.step) or trainer.save() for n in (2, 3)}
        actions = {1: saved_whole, 5: lambda trainer: reached.append(5)} | (actions if filled == 1 else {})
        before = actions.get(filled, reached.append)
        # What is still being written, on a slow machine, ends before the disk is full.
        actions[filled] = lambda trainer: (before(trainer), trainer.snapshots.writer.wait(), fill_disk(patch))
        with pytest.raises(TrainingError, match=r"bytes.*No space left on device; what was there before still is"):
            train(data, tmp_path, actions)
    assert (reached == [2, 3]) == (filled == 1)
    assert read_meta(tmp_path / "last")["state"]["step"] == kept
    fit(build(), task(data), SHORT, RUN, folder=tmp_path, spec=SPEC, resume=True)


@pytest.mark.parametrize("end", ["signal", "bad losses"])
def test_who_speaks_of_what_was_saved_has_waited_for_it(end, data, tmp_path, monkeypatch):  # noqa: F811
    def leave(trainer):
        if end == "signal":
            trainer._leave()
        trainer.run = replace(trainer.run, bad_losses=1)
        trainer._refuse(0, 3, trainer.updater.step(trainer.task.batch(0, 2), 0, 2, 3), None)

    with pytest.raises((Stopped, TrainingError), match=r"^143$|loss was not finite"):
        train(data, tmp_path / "whole", {3: leave})
    assert read_meta(tmp_path / "whole/last")["state"]["step"] >= 2
    fill_disk(monkeypatch)
    with pytest.raises(TrainingError, match="No space left"):
        train(data, tmp_path / "full", {3: leave})


def test_an_error_of_the_writer_stands_beside_the_one_that_ended_the_training():
    def fail():
        raise TrainingError("the disk is full")

    def run(then):
        with Writer() as writer:
            writer.start(fail)
            then()

    with pytest.raises(TrainingError, match="the disk is full"):
        run(lambda: None)
    with pytest.raises(Killed) as caught:
        run(lambda: die(None))
    assert caught.value.__notes__ == ["the last save failed too: the disk is full"]


def test_on_cuda_a_save_queues_copies_and_waits_for_none(monkeypatch, tmp_path):
    """Of weights and of the optimizer's moments and counts; the thread that writes waits for one event."""
    written = []
    monkeypatch.setattr(snapshots, "write_checkpoint", lambda folder, spec, files, **more: written.append(files))
    model = ViT("rope_mixed", img_size=(16, 24), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=10)
    with devtrace.fake_cuda() as recorder:
        devtrace.on_fake_cuda(model)
        images = ImageTask(devtrace.images(8, (16, 24)), (16, 24), 4, device="cuda")
        updater = Updater(model, images, OptimConfig(), RunConfig(device="cuda", precision="bfloat16"), ALONE)
        for parameter in model.parameters():
            updater.optimizer.state[parameter] = {
                name: torch.zeros(shape, device="cuda")
                for name, shape in dict(step=(), exp_avg=parameter.shape, exp_avg_sq=parameter.shape).items()
            }
        spec = ModelSpec("ViT", {})
        kept = Snapshots(tmp_path, spec, model, None, updater.optimizer, updater.scaler, ALONE)
        with recorder() as recorded, kept.writer:
            kept.save(("best", "last"), TrainingState(), {})
            traffic = recorded.traffic
            assert traffic.late.total() == 4 * len(list(model.parameters())), traffic.report("save")
            assert not traffic.to_host, traffic.report("save")
            assert not traffic.kernels, traffic.report("save")
            kept.finish()
        assert [read.partition(":")[0] for read in traffic.reads.elements()] == ["event training/writer.py"]
    assert [len(files["model"]) for files in written] == [len(model.state_dict())] * 2
