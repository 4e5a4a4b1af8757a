"""What each process of test_distributed.py does under torchrun: train in parallel, go on with another's run, or die."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tests.training.interrupted import after_updates
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.models.spec import ModelSpec
from vit2dpe.seeding import derive_seed
from vit2dpe.training.distributed import full_tensor, process_group
from vit2dpe.training.engine import fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.task import Task
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.update import Updater

SPEC = ModelSpec(
    "ViT",
    dict(
        position="rope_mixed+learned", img_size=(8, 12), patch_size=4, in_chans=1, num_classes=10, embed_dim=16,
        depth=2, num_heads=2, class_token=False, global_pool="avg",
    ),
)  # fmt: skip
# 95 images and batches of 24 leave 23 for the last step: the ranks' shares differ.
OPTIM = OptimConfig(lr=3e-3, warmup_epochs=1, epochs=3, batch_size=24, ema=0.9, accumulate=2)
RUN = RunConfig(device="cpu", save_minutes=0)


def go(folder, world, *, epochs=3, resume=False, freeze=0, **run):
    torch.manual_seed(derive_seed(0, "init"))
    data = load_images("digits", limit_train=95, limit_test=41)
    task = ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True, label_smoothing=0.1), world=world)
    optim, stop_after = replace(OPTIM, epochs=3, freeze=freeze), 4 * epochs
    settings = replace(RUN, **run)
    return fit(
        SPEC.build(), task, optim, settings, folder=folder, spec=SPEC, world=world, resume=resume, stop_after=stop_after
    )


class Uneven(Task):
    """Least squares over the items that count: all on the first rank; its mean is not a number elsewhere."""

    steps_per_epoch = 1
    best = None

    def batch(self, epoch, step):
        raise NotImplementedError("a test hands batches in")

    def evaluate(self, model):
        return {}

    def describe(self):
        return {}

    def count(self, batch):
        return int(batch[1].sum())

    def loss(self, model, batch):
        x, counts = batch
        return (model(x).square()[:, 0] * counts).sum() / counts.sum(), {"one": 1.0}


def uneven(folder, world, how):
    """An update to which the last rank has nothing to add, and the gradient that it ends with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optim, run = OptimConfig(lr=0.1, epochs=1, warmup_epochs=0, clip_grad=0.0), replace(RUN, parallel=how)
    updater = Updater(model, Uneven(), optim, run, world)
    updater.optimizer.step = lambda *_: None
    x = torch.arange(12.0).view(4, 3)
    counts = torch.tensor([True, True, False, False])
    own = world.share(4)
    found = updater.step((x[own], counts[own]), 0, 0, 0)
    gradients = {name: full_tensor(p.grad) for name, p in model.named_parameters()}
    torch.save(
        (found.numbers, found.items, found.finite, gradients), folder / f"uneven-{how}-{world.size}-{world.rank}.pt"
    )


def main(what, folder):
    torch.set_num_threads(1)
    with process_group(torch.device("cpu"), timeout_s=45) as world:
        if what == "dies":

            def killed(_):
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)

            with after_updates({6: killed} if world.rank == 1 else {}):
                go(folder, world)
        for how in ("ddp", "fsdp"):
            go(folder / how, world, parallel=how)
            go(folder / f"resumed-{how}", world, epochs=2, resume=True, parallel=how)  # begun by one process
            go(folder / f"frozen-{how}", world, epochs=1, parallel=how, freeze=1)
            uneven(folder, world, how)
        if world.first:
            (folder / "size.json").write_text(json.dumps(world.size))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
