"""A training that was stopped anywhere goes on to the same bits, for any task, and files are never half there."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import seal
from tests.training.interrupted import Killed, after_updates, die
from vit2dpe import ViT, load_run
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.errors import CheckpointError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.seeding import derive_seed, generator
from vit2dpe.training.checkpoint import read_meta, read_tensors
from vit2dpe.training.engine import Trainer, fit
from vit2dpe.training.log import read_table
from vit2dpe.training.optimizer import load_optimizer, make_optimizer, optimizer_state
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.snapshots import flatten, unflatten
from vit2dpe.training.task import Task, split_batch
from vit2dpe.training.tasks.classification import ImageTask

SPEC = ModelSpec(
    "ViT",
    dict(
        position="rope_mixed+learned", img_size=(8, 12), patch_size=4, in_chans=1, num_classes=10, embed_dim=16,
        depth=2, num_heads=2, class_token=False, global_pool="avg", drop_path_rate=0.3, drop_rate=0.1,
    ),
)  # fmt: skip
OPTIM = OptimConfig(lr=3e-3, warmup_epochs=1, epochs=3, batch_size=24, ema=0.9, layer_decay=0.8, accumulate=2)
RUN = RunConfig(device="cpu", save_minutes=0)
CLOCKED = {"seconds", "cpu_seconds", "images_per_s", "waiting"}


@pytest.fixture(scope="module")
def data():
    return load_images("digits", limit_train=96, limit_test=40)


def build():
    torch.manual_seed(derive_seed(0, "init"))
    return SPEC.build()


def task(data):
    return ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True, label_smoothing=0.1))


def everything(folder):
    meta = read_meta(folder)
    return {(name, key): value for name in meta["files"] for key, value in read_tensors(folder, meta, name).items()}


def same(one, other):
    a, b = everything(one / "last"), everything(other / "last")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCKED} for row in read_table(run / "metrics.csv")]
        for run in (one, other)
    ]
    assert rows[0] == rows[1]
    states = [read_meta(run / "last")["state"] | {"seconds": 0, "cpu_seconds": 0} for run in (one, other)]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(build(), task(data), OPTIM, RUN, folder=folder, spec=SPEC)
    return folder


@pytest.mark.parametrize("at", [1, 4, 6, 11])
def test_a_saved_step_goes_on_to_the_same_bits(data, whole, tmp_path, at):
    """Saved after update `at` (in an epoch, at its end), killed one update later."""
    with after_updates({at: Trainer.save, at + 1: die}), pytest.raises(Killed):
        fit(build(), task(data), OPTIM, RUN, folder=tmp_path, spec=SPEC)
    torch.manual_seed(99)
    fit(SPEC.build(), task(data), OPTIM, RUN, folder=tmp_path, spec=SPEC, resume=True)
    same(whole, tmp_path)
    assert everything(whole / "best").keys() == everything(tmp_path / "best").keys()


def test_clocks_go_on_from_the_parts_before(data, tmp_path, monkeypatch):
    """Each read of the processor's clock is a second more; a process that is started again reads from 1000 on."""
    config = replace(OPTIM, epochs=2)
    for start, epochs in ((0, 1), (1000, 2)):
        ticks = iter(range(start, start + 10**6))
        monkeypatch.setattr("time.process_time", lambda ticks=ticks: float(next(ticks)))
        rows = fit(build(), task(data), replace(config, epochs=epochs, warmup_epochs=0), RUN, folder=tmp_path,
                   spec=SPEC, resume=True)  # fmt: skip
    assert 0 < rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"] < 50
    saved = read_meta(tmp_path / "last")["state"]["cpu_seconds"]
    assert rows[1]["cpu_seconds"] <= saved < 50


def test_a_state_without_the_processors_clock_is_taken_up(data, tmp_path):
    """Versions before it did not write it."""
    fit(build(), task(data), replace(OPTIM, epochs=2), RUN, folder=tmp_path, spec=SPEC)
    meta = read_meta(tmp_path / "last")
    del meta["state"]["cpu_seconds"]
    (tmp_path / "last/model.json").write_text(json.dumps(seal(meta)))
    rows = fit(build(), task(data), OPTIM, RUN, folder=tmp_path, spec=SPEC, resume=True)
    assert len(rows) == 3
    assert rows[2]["cpu_seconds"] > 0


def test_killed_in_the_evaluation_or_before_the_first_save(data, whole, tmp_path, monkeypatch):
    real = ImageTask.evaluate
    for epoch in (0, 1):
        run = tmp_path / str(epoch)
        calls = iter(range(9))

        def dies(self, model, epoch=epoch, calls=calls):
            if next(calls) == epoch:
                raise Killed
            return real(self, model)

        with monkeypatch.context() as patch:
            patch.setattr(ImageTask, "evaluate", dies)
            with pytest.raises(Killed):
                fit(build(), task(data), OPTIM, RUN, folder=run, spec=SPEC)
        assert (run / "last").is_dir() == (epoch == 1)
        fit(build(), task(data), OPTIM, RUN, folder=run, spec=SPEC, resume=True)
        same(whole, run)


def test_a_finished_run_has_nothing_to_go_on_with(data, whole):
    before = everything(whole / "last")
    rows = fit(build(), task(data), OPTIM, RUN, folder=whole, spec=SPEC, resume=True)
    assert len(rows) == 3
    after = everything(whole / "last")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_loaded_is_what_was_evaluated(data, whole):
    model = load_run(whole)
    assert model.about["weights"] == "averaged"
    assert model.about["classes"] == list(data.classes)
    last = read_table(whole / "metrics.csv")[-1]
    assert task(data).evaluate(model)["test_loss"] == last["test_loss"]
    best = load_run(whole, which="best")
    assert best.about["final"]["test_top1"] == max(row["test_top1"] for row in read_table(whole / "metrics.csv"))


def test_another_model_or_other_data_cannot_be_resumed(data, whole):
    other = ModelSpec("ViT", SPEC.arguments | {"position": "rope"})
    with pytest.raises(CheckpointError, match=r"another model.*rope_mixed.*--init"):
        fit(other.build(), task(data), OPTIM, RUN, folder=whole, spec=other, resume=True)
    less = load_images("digits", limit_train=48, limit_test=40)
    with pytest.raises(CheckpointError, match="other data"):
        fit(build(), task(less), OPTIM, RUN, folder=whole, spec=SPEC, resume=True)
    with pytest.raises(CheckpointError, match=r"with --optim\.ema"):
        fit(build(), task(data), replace(OPTIM, ema=0.0), RUN, folder=whole, spec=SPEC, resume=True)


@dataclass
class Regression(Task):
    """The smallest task that is no classification: batches are lists, there is no best."""

    steps_per_epoch: int = 3
    best: tuple[str, str] | None = None

    def batch(self, epoch, step):
        x = torch.rand(10, 4, generator=generator(epoch, step))
        return [x, (x.sum(1, keepdim=True), "a note")]

    def loss(self, model, batch):
        x, (y, note) = batch
        assert note == "a note"
        loss = F.mse_loss(model(x), y)
        return loss, {"root": loss.sqrt()}

    def evaluate(self, model):
        return {"bias": model.bias.item()}

    def describe(self):
        return {"task": "regression"}


def test_the_loop_knows_no_images(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    rows = fit(model, Regression(), replace(OPTIM, epochs=20, lr=0.1, ema=0.0), RUN, folder=tmp_path)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 10
    assert {"root", "bias", "items_per_s"} <= set(rows[0])
    assert not (tmp_path / "last").exists()


def test_parts_of_a_batch_add_up_to_the_batch(data, tmp_path):
    weights = []
    for parts in (1, 3, 5):
        torch.manual_seed(0)
        model = ViT(**SPEC.arguments | {"drop_path_rate": 0.0, "drop_rate": 0.0})
        fit(model, task(data), replace(OPTIM, accumulate=parts, epochs=1), RUN, folder=tmp_path / str(parts))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=2e-5, rtol=0)


def test_batches_are_cut_wherever_their_tensors_are():
    parts = split_batch({"x": torch.arange(5), "more": [torch.arange(10).view(5, 2), 7]}, 2)
    assert [p["x"].tolist() for p in parts] == [[0, 1, 2], [3, 4]]
    assert [p["more"][0].shape for p in parts] == [(3, 2), (2, 2)]
    assert parts[1]["more"][1] == 7


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "muon", "adafactor", "nadamw"])
def test_every_kind_of_optimizer_goes_on_to_the_same_bits(name, tmp_path):
    """LAMB counts its updates in the groups, Muon keeps other state for matrices, Adafactor factored ones."""
    x, updates = torch.randn(8, 6, generator=generator(0, name)), []
    for cut in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        optimizer = make_optimizer(net, OptimConfig(name=name, lr=0.01))
        for step in range(4):
            if cut and step == 2:
                tensors, net_state = {}, net.state_dict()
                tree = json.loads(json.dumps(flatten(optimizer_state(net, optimizer), tensors)))
                net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
                net.load_state_dict(net_state)
                optimizer = make_optimizer(net, OptimConfig(name=name, lr=0.01))
                load_optimizer(net, optimizer, unflatten(tree, tensors))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        updates.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*updates)
