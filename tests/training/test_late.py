"""Numbers of a step are read when the next one is queued; the weights, the average and every promise stay the same.

The fused optimizers of torch leave out a step by a flag on any device, so that all of it runs here on the CPU.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, build, data, everything, same, task  # noqa: F401
from tests.training.test_update import Fit as Line
from tests.training.test_update import X, Y, line
from vit2dpe.errors import TrainingError
from vit2dpe.training import optimizer as optimizers
from vit2dpe.training.checkpoint import read_meta
from vit2dpe.training.distributed import ALONE, shard_like
from vit2dpe.training.engine import Trainer, fit
from vit2dpe.training.late import StepResult
from vit2dpe.training.optimizer import FUSED, make_optimizer, takes_fused
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.update import Updater


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The CPU has the fused steps of CUDA."""
    monkeypatch.setattr(optimizers, "takes_fused", lambda name, device: name in FUSED)


def at_once(monkeypatch):
    """As every other optimizer: the host reads the numbers and decides on the step."""
    create = Updater.__init__

    def early(self, *args):
        create(self, *args)
        self.late = False

    monkeypatch.setattr(Updater, "__init__", early)


def poison(monkeypatch, *places):
    """Images of these (epoch, step) become NaN; of all from (e, s) on, where it is followed by None."""
    real = ImageTask.batch

    def batch(self, epoch, step):
        found = real(self, epoch, step)
        bad = (epoch, step) in places or (places[-1] is None and (epoch, step) >= places[0])
        return found | {"images": found["images"] * math.nan} if bad else found

    monkeypatch.setattr(ImageTask, "batch", batch)


@pytest.fixture(scope="module")
def early(data, tmp_path_factory):  # noqa: F811
    """A training with two bad steps, one of them the last of an epoch, whose numbers are read at once."""
    folder = tmp_path_factory.mktemp("early")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "takes_fused", lambda name, device: name in FUSED)
        at_once(patch)
        poison(patch, (0, 1), (1, 3))
        fit(build(), task(data), OPTIM, RUN, folder=folder, spec=SPEC)
    return folder


def test_reading_late_changes_no_bit(data, early, tmp_path, monkeypatch):  # noqa: F811
    poison(monkeypatch, (0, 1), (1, 3))
    fit(build(), task(data), OPTIM, RUN, folder=tmp_path, spec=SPEC)
    same(early, tmp_path)
    bad = [(run / "bad_batches.jsonl").read_text().splitlines() for run in (early, tmp_path)]
    assert bad[0] == bad[1]
    assert [(entry["epoch"], entry["step"]) for entry in map(json.loads, bad[0])] == [(0, 1), (1, 3)]


@pytest.mark.parametrize("at", [2, 7, 8])
def test_a_saved_step_goes_on_to_the_same_bits(data, early, tmp_path, monkeypatch, at):  # noqa: F811
    """Saved before the numbers of its last update were read: 2 and 8 are the bad ones."""
    poison(monkeypatch, (0, 1), (1, 3))
    with after_updates({at: Trainer.save, at + 1: die}), pytest.raises(Killed):
        fit(build(), task(data), OPTIM, RUN, folder=tmp_path, spec=SPEC)
    fit(SPEC.build(), task(data), OPTIM, RUN, folder=tmp_path, spec=SPEC, resume=True)
    same(early, tmp_path)


def test_the_third_bad_loss_ends_with_the_weights_before_the_first(data, tmp_path, monkeypatch):  # noqa: F811
    poison(monkeypatch, (1, 1), None)
    with pytest.raises(TrainingError, match=r"3 times in a row, last at epoch 1, step 3"):
        fit(build(), task(data), OPTIM, RUN, folder=tmp_path / "bad", spec=SPEC)
    with after_updates({5: lambda trainer: (trainer.save(), die(trainer))}), pytest.raises(Killed):
        fit(build(), task(data), OPTIM, RUN, folder=tmp_path / "good", spec=SPEC)
    bad, good = everything(tmp_path / "bad/last"), everything(tmp_path / "good/last")
    assert all(torch.equal(good[key], bad[key]) for key in good)
    states = [read_meta(tmp_path / run / "last")["state"] for run in ("bad", "good")]
    assert [state["step"] for state in states] == [5, 5]
    assert states[0]["sums"] == states[1]["sums"]


def test_each_steps_numbers_are_read_after_the_next_ones_backward_pass(data, tmp_path, monkeypatch):  # noqa: F811
    events = []
    backward, numbers = torch.Tensor.backward, StepResult.finite.func
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (events.append("backward"), backward(loss))[1])
    monkeypatch.setattr(Updater, "_step_if", _noting(events, "step", Updater._step_if))
    reading = property(lambda self: (events.append("read"), numbers(self))[1])
    monkeypatch.setattr(StepResult, "finite", reading)
    optim = replace(OPTIM, epochs=1, warmup_epochs=0, accumulate=1, ema=0.0)
    fit(build(), task(data), optim, RUN, folder=tmp_path)
    assert events == ["backward", "step", *["backward", "read", "step"] * 3, "read"]


def _noting(events, word, function):
    def noted(*args):
        events.append(word)
        return function(*args)

    return noted


class Fit(Line):
    extra = 0.0

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().mean() + self.extra, {}


def update(precision="float32", name="adamw", **more):
    optim = OptimConfig(**dict(name=name, lr=0.1, epochs=2, warmup_epochs=0) | more)
    return Updater(line(), Fit(), optim, RunConfig(device="cpu", precision=precision), ALONE)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_device_leaves_out_a_bad_step_whole(name, what, bad):
    """Weights, moments and counts stay as they are."""
    updater = update(name=name)
    assert updater.late
    assert updater.step((X, Y), 0, 0, 0).finite
    weight, state = updater.model.weight, updater.optimizer.state[updater.model.weight]
    before = [weight.detach().clone(), *(value.clone() for value in state.values() if value is not None)]
    if what == "loss":
        updater.task.extra = bad  # the gradient is finite
    else:
        hook = weight.register_hook(lambda gradient: gradient * bad)
    assert not updater.step((X, Y), 0, 1, 1).finite
    after = [weight, *(value for value in state.values() if value is not None)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    updater.task.extra = 0.0
    if what == "gradient":
        hook.remove()
    assert updater.step((X, Y), 0, 2, 2).finite
    assert not torch.equal(before[0], weight)


def test_float16_halves_its_factor_and_a_bad_loss_is_told_from_an_overflow():
    updater = update("float16")
    first, factors = updater.model.weight.detach().clone(), []
    for done in range(20):
        factors.append(updater.scaler.get_scale())
        result = updater.step((X, Y), 0, done, done)
        assert result.finite
        if not torch.equal(first, updater.model.weight):
            break
        assert not math.isfinite(result.norm)
    assert factors == [65536 / 2**n for n in range(len(factors))]
    assert len(factors) > 1
    weight = updater.model.weight.detach().clone()
    updater.task.extra = math.inf  # its gradient is finite, and so no overflow
    assert not updater.step((X, Y), 0, 20, 20).finite
    assert torch.equal(weight, updater.model.weight)
    updater.task.extra = 0.0
    assert updater.step((X, Y), 0, 21, 21).finite
    assert not torch.equal(weight, updater.model.weight)


def test_other_optimizers_and_other_devices_read_at_once(monkeypatch):
    assert not update(name="lamb").late
    monkeypatch.undo()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [takes_fused(*case) for case in (("adamw", cpu), ("adamw", cuda), ("lamb", cuda))] == [False, True, False]
    assert not make_optimizer(nn.Linear(1, 1), OptimConfig()).defaults["fused"]


def test_a_fused_optimizer_counts_its_steps_where_the_parameters_are():
    count, like = torch.tensor(3.0), torch.empty(2, device="meta")
    assert shard_like(count, like).device.type == "cpu"
    assert shard_like(count, like, scalars=True).device.type == "meta"
