"""What each process of test_distributed.py does under torchrun: train in parallel, go on with another's run, or die."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.training.interrupted import after_updates
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.models.spec import ModelSpec
from vit2dpe.seeding import derive_seed
from vit2dpe.training.distributed import process_group
from vit2dpe.training.engine import fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.tasks.classification import ImageTask

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


def go(folder, world, *, epochs=3, resume=False, **run):
    torch.manual_seed(derive_seed(0, "init"))
    data = load_images("digits", limit_train=95, limit_test=41)
    task = ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True, label_smoothing=0.1), world=world)
    optim, stop_after = replace(OPTIM, epochs=3), 4 * epochs
    settings = replace(RUN, **run)
    return fit(
        SPEC.build(), task, optim, settings, folder=folder, spec=SPEC, world=world, resume=resume, stop_after=stop_after
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
        if world.first:
            (folder / "size.json").write_text(json.dumps(world.size))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
