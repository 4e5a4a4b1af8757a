"""--data.val_fraction: a part of train that is held out, decides what is best, and is never trained on."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.training.test_train import MICRO, at
from vit2dpe import load_run
from vit2dpe.cli import main
from vit2dpe.data.datasets import load_images
from vit2dpe.data.splits import Split
from vit2dpe.errors import ConfigError
from vit2dpe.resolution.sweep import evaluate
from vit2dpe.training.log import read_table
from vit2dpe.training.objectives.images import train
from vit2dpe.training.tasks.classification import ImageTask


def numbered(counts):
    """A split whose images are their own numbers, with so many of each class."""
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    return Split(torch.arange(len(labels)), labels)


@pytest.mark.parametrize(
    ("counts", "fraction"), [((10, 20, 30), 0.1), ((2, 7, 3), 0.5), ((5, 5), 0.01), ((3, 4), 0.99)]
)
def test_a_part_of_every_class_is_held_out(counts, fraction):
    rest, held = numbered(counts).hold_out(fraction, seed=3)
    assert sorted([*rest.images.tolist(), *held.images.tolist()]) == list(range(sum(counts))), "each image once"
    wanted = [min(max(1, round(n * fraction)), n - 1) for n in counts]
    assert held.labels.bincount().tolist() == wanted
    again, other = numbered(counts).hold_out(fraction, seed=3)[1], numbered((50, 60)).hold_out(0.3, seed=4)[1]
    assert torch.equal(held.images, again.images)
    assert not torch.equal(other.images, numbered((50, 60)).hold_out(0.3, seed=5)[1].images)


def test_what_cannot_be_held_out_is_refused():
    with pytest.raises(ConfigError, match="class 1 has one"):
        numbered((3, 1)).hold_out(0.5, 0)
    with pytest.raises(ConfigError, match=r"in \(0, 1\), got 1"):
        numbered((3, 3)).hold_out(1.0, 0)
    assert main(["train", "--data.val_fraction", "1.5"]) == 2


def test_it_decides_what_is_best_and_when_to_stop(tmp_path, monkeypatch):
    """Validation falls after the first epoch while the test accuracy rises: the first epoch is the best one."""
    real = ImageTask.evaluate
    epochs = iter(range(9))

    def told(self, model):
        epoch = next(epochs)
        return real(self, model) | dict(val_top1=50.0 - epoch, test_top1=50.0 + epoch)

    monkeypatch.setattr(ImageTask, "evaluate", told)
    config = replace(MICRO, data=replace(MICRO.data, val_fraction=0.25), optim=replace(MICRO.optim, epochs=9))
    out = train(at(config, tmp_path, patience=2))
    assert len(read_table(out / "metrics.csv")) == 3
    assert load_run(out, which="best").about["final"]["epoch"] == 1


def test_the_columns_and_the_digest(tmp_path):
    config = replace(MICRO, data=replace(MICRO.data, val_fraction=0.25))
    out = train(at(config, tmp_path / "run"))
    row = read_table(out / "metrics.csv")[-1]
    assert {f"{split}_{name}" for split in ("val", "test") for name in ("top1", "top5", "loss")} <= set(row)
    assert row["val_top5"] >= row["val_top1"]
    data = [load_images("digits", limit_train=64, val_fraction=part) for part in (0.0, 0.25, 0.5)]
    assert len({each.digest for each in data}) == 3, "another split is other data: not to be resumed with"
    assert all(len(each.train) + len(each.val) == 64 for each in data[1:])
    whole = {image.numpy().tobytes() for image in data[1].train.images}
    assert not any(image.numpy().tobytes() in whole for image in data[1].val.images)


def test_folders_without_a_held_out_split(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))
    for label, name in enumerate("ab"):
        (tmp_path / "data/train" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (5, 4), (100 * label, 10 * i, 0)).save(tmp_path / f"data/train/{name}/{i}.png")
    data = load_images("folder", tmp_path / "data", val_fraction=0.25)
    assert (len(data.train), len(data.test), data.val) == (12, 4, None)
    assert ImageTask(data, (4, 5), 4).best == ("test_top1", "max")
    assert "there is no other held-out split" in " ".join(data.notes)


def test_top_five_by_hand():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7]])
    model = torch.nn.Identity()
    score = evaluate(model, [(logits, torch.tensor([4, 1]))], top=(1, 5))
    assert (score["top1"], score["top5"], score["n"]) == (0, 50, 2)
    assert evaluate(model, [(logits, torch.tensor([0, 1]))]).keys() == {"top1", "loss", "n"}
