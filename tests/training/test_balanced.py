"""--data.balanced draws classes equally often, --per-class measures each of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import precision_score, recall_score

from tests.data.pictures import photos
from tests.helpers import read_csv
from tests.training.interrupted import Killed, after_updates, die
from vit2dpe import load_run
from vit2dpe.cli import main
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.models.spec import ModelSpec
from vit2dpe.resolution.sweep import evaluate
from vit2dpe.training.by_class import markdown, read_classes, rows_of, write_classes
from vit2dpe.training.distributed import World
from vit2dpe.training.engine import Trainer, fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.task import BalancedOrder
from vit2dpe.training.tasks.classification import ImageTask, evaluation_batches

pytestmark = pytest.mark.need("D20")


def drawn(order: BalancedOrder, epoch: int, batch_size: int = 4) -> torch.Tensor:
    steps = -(-len(order) // batch_size)
    return torch.cat([order.batch(batch_size, epoch, step) for step in range(steps)])


@pytest.mark.parametrize("counts", [(1, 5, 30), (7, 0, 2), (4, 4), (3,), (1, 100, 0, 2)])
def test_each_class_is_drawn_equally_often_and_its_images_too(counts: tuple[int, ...]) -> None:
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    order = BalancedOrder(labels, seed=3)
    classes = sum(n > 0 for n in counts)
    assert len(order) == classes * -(-sum(counts) // classes)
    for epoch in range(3):
        index = drawn(order, epoch)
        assert labels[index].bincount(minlength=len(counts)).tolist() == [
            len(order) // classes * (n > 0) for n in counts
        ]
        for label, n in enumerate(counts):
            times = index[labels[index] == label].bincount(minlength=len(labels))[labels == label]
            assert n == 0 or int(times.max() - times.min()) <= 1, "an image is drawn twice more than another one"
    if len(labels) > len(counts) > 1:
        assert not torch.equal(drawn(order, 0), drawn(order, 1)), "epochs are drawn anew"
        assert not torch.equal(drawn(order, 0), drawn(BalancedOrder(labels, seed=4), 0))
    assert torch.equal(drawn(BalancedOrder(labels, seed=3), 2), drawn(order, 2)), "a pure function of its key"
    most = max(range(len(counts)), key=counts.__getitem__)
    if counts[most] > len(order) // classes:  # what an epoch leaves out of a frequent class comes in another one
        parts = [{*drawn(order, epoch).tolist()} for epoch in range(2)]
        assert parts[0] != parts[1]


def unbalanced(balanced: bool = True, world: World = World(), size: int = 12) -> ImageTask:  # noqa: B008 - frozen
    data = load_images("digits", limit_train=120, limit_test=60)
    kept = data.train.select(((data.train.labels < 2) | (torch.arange(120) % 5 == 0)).nonzero()[:, 0])
    augment = AugmentConfig(shift=1, flip=True, erase=0.5)
    return ImageTask(replace(data, train=kept), (8, 12), size, augment=augment, world=world, balanced=balanced)


def test_two_processes_together_have_what_one_has() -> None:
    whole, halves = unbalanced(), [unbalanced(world=World(rank, 2)) for rank in (0, 1)]
    last = whole.steps_per_epoch - 1
    for epoch, step in ((0, 0), (1, 2), (1, last)):
        one, parts = whole.batch(epoch, step), [half.batch(epoch, step) for half in halves]
        for name, value in one.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts])), name
    seen = torch.cat([whole.batch(0, step)["index"] for step in range(last + 1)])
    counts = whole.data.train.labels[seen].bincount()
    assert len(counts.unique()) == 1
    assert len(unbalanced(False).data.train.labels.bincount().unique()) > 1, "balanced data would show nothing"


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    optim = OptimConfig(lr=3e-3, warmup_epochs=1, epochs=2, batch_size=12)
    arguments = dict(position="rope", img_size=(8, 12), patch_size=4, in_chans=1, num_classes=10, embed_dim=16)
    spec = ModelSpec("ViT", arguments | dict(depth=1, num_heads=2))

    def go(folder: Path, balanced: bool = True) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        run = RunConfig(device="cpu", save_minutes=0)
        fit(spec.build(), unbalanced(balanced), optim, run, folder=folder, spec=spec, resume=True)
        return load_run(folder).state_dict()

    steps = unbalanced().steps_per_epoch
    with after_updates({steps + 1: Trainer.save, steps + 2: die}), pytest.raises(Killed):
        go(tmp_path / "killed")
    whole, again, plain = go(tmp_path / "whole"), go(tmp_path / "killed"), go(tmp_path / "plain", balanced=False)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], plain[name]) for name in whole)


def test_counts_by_class_are_those_of_sklearn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(90, 5), torch.randint(0, 3, (90,))  # classes 3 and 4 have no image
    logits[:, 4] = -9  # and 4 is never named
    counts: list[torch.Tensor] = []
    evaluate(torch.nn.Identity(), [(logits[:50], labels[:50]), (logits[50:], labels[50:])], by_class=counts)
    rows = rows_of(counts[0], ["a", "b|c", "ü", "d"])
    named = logits.argmax(1)
    recall = recall_score(labels, named, labels=[0, 1, 2], average=None)
    precision = precision_score(labels, named, labels=[0, 1, 2], average=None)
    assert [row.name for row in rows] == ["a", "b|c", "ü", "d", "4", ""]
    assert [row.n for row in rows] == [*labels.bincount(minlength=5).tolist(), 90]
    assert [row.accuracy for row in rows[:3]] == pytest.approx(100 * recall)
    assert [row.precision for row in rows[:3]] == pytest.approx(100 * precision)
    assert (rows[3].accuracy, rows[3].precision, rows[4].precision) == (None, 0, None)
    assert rows[-1].accuracy == pytest.approx(100 * recall.mean())
    assert rows[-1].precision == pytest.approx(100 * precision.mean())
    assert [row.name for row in rows_of(counts[0], ["a", "b|c", "ü", "d"], seen=True)] == ["a", "b|c", "ü", "d", ""]
    write_classes(tmp_path / "classes.csv", [({"split": "test"}, rows)])
    assert read_classes(tmp_path / "classes.csv") == [({"split": "test"}, row) for row in rows]
    assert "| b\\|c |" in "\n".join(markdown("by class", rows))
    many = rows_of(torch.stack([torch.full((30,), 2), torch.arange(30) % 3, torch.ones(30).long()]), [])
    assert "the 20 least accurate classes of 30" in "\n".join(markdown("by class", many))


def test_shares_of_two_processes_add_up() -> None:
    data = load_images("digits", limit_train=20, limit_test=41)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    found: list[torch.Tensor] = []
    for world in (World(), World(0, 2), World(1, 2)):
        evaluate(model, evaluation_batches(data, batch=16, world=world), by_class=found)
    assert torch.equal(found[0], found[1] + found[2])
    assert found[0][0].sum() == found[0][2].sum() == 41


def test_numbers_of_a_run_an_evaluation_and_a_study(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, run = photos(tmp_path / "photos"), tmp_path / "run"
    small = ["--model.width", "24", "--model.depth", "1", "--model.heads", "2", "--epochs", "1", "--device", "cpu"]
    words = ["--root", str(mine), *small, "--threads", "1", "--per_class", "true", "--balanced", "true"]
    assert main(["train", *words, "--out", str(run)]) == 0
    assert "balanced accuracy" in capsys.readouterr().out
    table = read_csv(run / "classes.csv")
    assert list(table[0]) == ["split", "class", "n", "accuracy", "precision"]
    final = json.loads((run / "best" / "model.json").read_text())["final"]["test_top1"]
    right = sum(int(row["n"]) * float(row["accuracy"]) for row in table if row["class"])
    assert right / int(table[-1]["n"]) == pytest.approx(final)
    assert "| mean of classes |" in (run / "summary.md").read_text()
    ev = tmp_path / "ev"
    words_of = ["--model", str(run), "--root", str(mine), "--sizes", "48,64", "--policies", "default"]
    assert main(["evaluate", *words_of, "--per_class", "true", "--out", str(ev)]) == 0
    by_size = read_csv(ev / "classes.csv")
    at_train = [row for row in by_size if row["height"] == "48" and row["class"]]
    assert [row["accuracy"] for row in at_train] == [row["accuracy"] for row in table if row["class"]]
    assert not (tmp_path / "run2").exists()
    out = tmp_path / "study"
    words = [*words, "--encodings", "none", "--train_size", "48", "--sizes", "48", "--modes", "scale", "--jobs", "1"]
    assert main(["study", *words, "--out", str(out)]) == 0
    studied, rows = read_csv(out / "classes.csv"), read_csv(out / "results.csv")
    of_class = [row for row in studied if row["class"]]
    right = sum(int(row["n"]) * float(row["accuracy"]) for row in of_class)
    assert right / sum(int(row["n"]) for row in of_class) == pytest.approx(float(rows[0]["top1"]))


def test_where_it_has_no_use_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--data.balanced", "true"]) == 2
    assert "masked pretraining sees no classes" in capsys.readouterr().err
    assert main(["study", "--task", "copy", "--data.balanced", "true"]) == 2
    assert "task copy has no use for balanced" in capsys.readouterr().err
