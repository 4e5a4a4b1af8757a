"""`optim.freeze`: which parameters it holds, that they and their modules stay as they were, and resuming."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tests.helpers import micro_vit, randn
from tests.training.interrupted import Killed, after_updates, die
from vit2dpe import ViT
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.errors import ConfigError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.training.checkpoint import read_meta, read_tensors
from vit2dpe.training.distributed import ALONE
from vit2dpe.training.engine import fit
from vit2dpe.training.freezing import freeze, frozen_parameters
from vit2dpe.training.optimizer import make_optimizer, optimizer_state
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.update import Updater

TEXT = dict(vocab_size=20, position="learned", embed_dim=16, depth=2, num_heads=2, context=8)
SPEC = ModelSpec(
    "ViT",
    dict(
        position="rope_mixed+learned", img_size=(8, 12), patch_size=4, in_chans=1, num_classes=10, embed_dim=16,
        depth=3, num_heads=2, class_token=False, global_pool="avg", drop_path_rate=0.5, drop_rate=0.1,
    ),
)  # fmt: skip
OPTIM = OptimConfig(lr=3e-3, warmup_epochs=0.1, epochs=2, batch_size=24, freeze=2, layer_decay=0.8, ema=0.9)


def swin():
    sizes = dict(depths=(2, 1), num_heads=(2, 4), embed_dim=16, window_size=2, img_size=(16, 32), patch_size=4)
    return ModelSpec("Swin", dict(num_classes=3, position="relative", **sizes)).build()


def text():
    return ModelSpec("TextEncoder", TEXT | dict(num_classes=3)).build()


@pytest.mark.parametrize(
    ("make", "blocks", "parts"),
    [
        (lambda: micro_vit("learned+rope_mixed"), 1, ("cls_token", "patch_embed.", "position.", "blocks.0.")),
        (lambda: micro_vit("relative"), 2, ("cls_token", "patch_embed.", "blocks.", "norm.")),
        (swin, 1, ("patch_embed.", "layers.0.blocks.0.")),
        (swin, 3, ("patch_embed.", "layers.", "norm.")),
        (text, 1, ("embed.", "position.", "blocks.0.")),
        (text, 2, ("embed.", "position.", "blocks.", "norm.")),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, num_classes=3), 2,
         ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")),
    ],
)  # fmt: skip
def test_leading_blocks_and_everything_before_them_are_held(make, blocks, parts):
    model = make()
    held = frozen_parameters(model, blocks)
    assert sorted(held) == sorted(name for name, _ in model.named_parameters() if name.startswith(parts))
    state = optimizer_state(model, make_optimizer(model, OptimConfig(freeze=blocks)))
    assert not state
    model.train()
    (model(torch.ones(2, 5, dtype=torch.long)) if hasattr(model, "context") else model(_image(model))).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set(held)


def _image(model):
    return randn(2, 3, *model.patch_embed.img_size)


@pytest.mark.parametrize(
    ("model", "blocks", "message"),
    [
        (micro_vit(), 3, "ViT has 2 blocks, got 3; 2 leaves the head alone"),
        (ModelSpec("TextDecoder", TEXT).build(), 2, "leaves no parameter of this TextDecoder to train"),
        (nn.Linear(2, 2), 1, "Linear is none"),
    ],
)
def test_what_cannot_be_held_is_refused(model, blocks, message):
    with pytest.raises(ConfigError, match=message):
        freeze(model, blocks)


def test_nothing_is_frozen_by_default():
    model = micro_vit()
    assert freeze(model, 0) == []
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def data():
    return load_images("digits", limit_train=96, limit_test=40)


def task(data):
    return ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True, label_smoothing=0.1))


def test_what_is_frozen_computes_as_in_evaluation_and_the_rest_is_trained(data):
    """No stochastic depth and no dropout in frozen blocks; both in the others."""
    updater = Updater(SPEC.build(), task(data), OPTIM, RunConfig(device="cpu"), ALONE)
    updater.step(updater.task.batch(0, 0), 0, 0, 0)
    blocks = updater.model.blocks
    assert [block.training for block in blocks] == [False, False, True]
    assert [block.drop_path1.training for block in blocks if hasattr(block.drop_path1, "drop_prob")] == [False, True]
    assert (updater.model.patch_embed.training, updater.model.training) == (False, True)
    assert {name.split(".")[0] for name in optimizer_state(updater.model, updater.optimizer) if name} == {
        "blocks", "fc_norm", "head",
    }  # fmt: skip


def test_batch_norms_of_frozen_layers_keep_their_statistics():
    model = timm.create_model("resnet10t", num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for part in freeze(model.train(), 2):
        part.eval()
    model(randn(4, 3, 32, 32))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith(("layer3.", "layer4.")) for name in moved), moved


def test_a_frozen_training_goes_on_to_the_same_bits(data, tmp_path):
    def run(folder, **more):
        torch.manual_seed(0)
        return fit(SPEC.build(), task(data), OPTIM, replace(RunConfig(device="cpu"), save_minutes=0), folder=folder,
                   spec=SPEC, **more)  # fmt: skip

    run(tmp_path / "whole")
    with pytest.raises(Killed), after_updates({5: die}):
        run(tmp_path / "killed")
    run(tmp_path / "killed", resume=True)
    one, two = (
        {(f, k): v for f in ("model", "raw", "optimizer") for k, v in read_tensors(at, read_meta(at), f).items()}
        for at in (tmp_path / "whole" / "last", tmp_path / "killed" / "last")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    torch.manual_seed(0)
    first = SPEC.build().state_dict()
    kept = {name for name in first if torch.equal(one["model", name], first[name])}
    assert kept == set(frozen_parameters(ViT(**_as_tuples(SPEC.arguments)), 2))
    assert not any(name.split("/")[0] in kept for file, name in one if file == "optimizer")


def _as_tuples(arguments):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
