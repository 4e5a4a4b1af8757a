"""A training that goes on with other steps goes on by the samples that were seen: each once an epoch, at their rate."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.helpers import seal
from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import OPTIM, RUN, SPEC, Regression, build
from vit2dpe.data.datasets import load_images
from vit2dpe.errors import CheckpointError
from vit2dpe.training.checkpoint import read_meta
from vit2dpe.training.distributed import ALONE
from vit2dpe.training.engine import Trainer, fit
from vit2dpe.training.log import read_table
from vit2dpe.training.optimizer import make_optimizer, make_schedule
from vit2dpe.training.tasks.classification import ImageTask


class Watched(ImageTask):
    """Keeps which images each epoch trained, where in it, and how many."""

    def batch(self, epoch, step):
        batch = super().batch(epoch, step)
        self.seen.append((epoch, step, batch["index"].tolist()))
        return batch


@pytest.fixture(scope="module")
def data():
    return load_images("digits", limit_train=97, limit_test=20)  # 5 batches of 24, the last of one image


def go(folder, data, size, *, resume=False, kill=None, **optim):
    """What was trained, and the rate of each update."""
    task = Watched(data, (8, 12), size)
    task.seen, rates = [], []
    optim = replace(OPTIM, batch_size=size, **optim)
    trainer = Trainer(build(), task, optim, RUN, folder, SPEC, ALONE, {}, None, None, None)
    step = trainer.updater.step

    def watched(*args, **more):
        rates.append(trainer.updater.lr)
        return step(*args, **more)

    trainer.updater.step = watched
    if kill is None:
        trainer.fit(resume)
    else:
        with after_updates({kill: Trainer.save, kill + 1: die}), pytest.raises(Killed):
            trainer.fit(resume)
        task.seen.pop()
    return task.seen, rates


@pytest.mark.need("D1")
@pytest.mark.parametrize(
    ("kill", "size"), [(2, 48), (2, 16), (4, 12), (5, 97), (5, 6), (7, 16), (10, 48), (1, 24), (3, 9)]
)
def test_another_batch_size_goes_on_by_samples_seen(data, tmp_path, kill, size):
    """24 before; every image is trained once an epoch, where the samples seen are whole batches of the new size too."""
    before, _ = go(tmp_path, data, 24, kill=kill)
    after, rates = go(tmp_path, data, size, resume=True)
    for epoch in range(3):
        seen = [i for e, _, index in before + after if e == epoch for i in index]
        assert sorted(seen) == list(range(97))
    steps = math.ceil(97 / size)
    places = [epoch * steps + step for epoch, step, _ in after]
    assert places == list(range(places[0], 3 * steps)), "one after the other, to the end"
    schedule = make_schedule(make_optimizer(build(), OPTIM), OPTIM, steps)
    wanted = []
    for place in places:
        schedule.step_update(place)
        wanted.append(max(group["lr"] for group in schedule.optimizer.param_groups))
    assert rates == pytest.approx(wanted)
    rows = read_table(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["train_loss"]) for row in rows)
    assert rows[-1]["step"] == len(before) + len(after), "updates are counted, so that curves go on"


@pytest.mark.need("D1")
@pytest.mark.parametrize(("size", "again"), [(48, 24), (17, 7), (64, 24)])
def test_less_than_a_batch_is_seen_again_where_samples_are_no_whole_batches(data, tmp_path, size, again):
    before, _ = go(tmp_path, data, 24, kill=1)
    after, _ = go(tmp_path, data, size, resume=True)
    seen = sorted(i for e, _, index in before + after if e == 0 for i in index)
    assert set(seen) == set(range(97))
    assert len(seen) - 97 == again < size


@pytest.mark.need("D1")
def test_going_on_twice_with_other_sizes(data, tmp_path):
    parts = [go(tmp_path, data, 24, kill=2)[0], go(tmp_path, data, 16, resume=True, kill=5)[0]]
    parts.append(go(tmp_path, data, 8, resume=True)[0])
    for epoch in range(3):
        assert sorted(i for part in parts for e, _, index in part if e == epoch for i in index) == list(range(97))


class Long(Regression):
    """A task that says how many steps an epoch has, as those of text do; a note for a checkpoint."""

    def batch(self, epoch, step):
        self.seen.append((epoch, step))
        return super().batch(epoch, step)


@pytest.mark.need("D1")
@pytest.mark.parametrize(("kill", "steps", "wanted"), [
    (3, 5, [(1, s) for s in range(5)] + [(2, s) for s in range(5)]),
    (3, 2, [(1, 0), (1, 1), (2, 0), (2, 1)]),
    (5, 5, [(1, 2), (1, 3), (1, 4)] + [(2, s) for s in range(5)]),
    (5, 2, [(2, 0), (2, 1)]),
])  # fmt: skip
def test_other_steps_an_epoch(tmp_path, kill, steps, wanted):
    """3 before. An epoch of which more has been trained than it has now is over."""
    spec = type("Spec", (), dict(kind="line", arguments={}))()
    optim = replace(OPTIM, ema=0.0, accumulate=1)
    seen = []
    for count, resume in ((3, False), (steps, True)):
        task = Long(steps_per_epoch=count)
        task.seen = seen = []
        model = torch.nn.Linear(4, 1)
        if resume:
            fit(model, task, optim, RUN, folder=tmp_path, spec=spec, resume=True)
        else:
            with after_updates({kill: Trainer.save, kill + 1: die}), pytest.raises(Killed):
                fit(model, task, optim, RUN, folder=tmp_path, spec=spec)
    assert seen == wanted
    assert all(math.isfinite(row["train_loss"]) for row in read_table(tmp_path / "metrics.csv"))


@pytest.mark.need("D1")
def test_a_state_that_does_not_say_its_steps_goes_on_with_the_same_ones_alone(data, tmp_path):
    go(tmp_path, data, 24, kill=7)
    meta = read_meta(tmp_path / "last")
    for name in ("shift", "batch_size", "steps_per_epoch"):
        del meta["state"][name]
    (tmp_path / "last/model.json").write_text(json.dumps(seal(meta)))
    with pytest.raises(CheckpointError, match=r"stopped at step 7, in epoch 2, with optim\.batch_size 24.*3 of 48"):
        go(tmp_path, data, 48, resume=True)
    after, _ = go(tmp_path, data, 24, resume=True)
    assert after[0][:2] == (1, 2)
