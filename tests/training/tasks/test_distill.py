"""A model that learns from another one: the loss, the batches, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import randn, shaken, within
from vit2dpe import MAE, ConfigError, Swin, ViT
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.training.distributed import ALONE, World
from vit2dpe.training.engine import fit
from vit2dpe.training.settings import OptimConfig, RunConfig
from vit2dpe.training.task import tensors_of
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.tasks.distill import DistillTask, answers_differ, features_differ, look, spreads

close = within(1e-6)
OWN = (8, 12)


@pytest.fixture(scope="module")
def data():
    return load_images("digits", limit_train=70, limit_test=20)


def vit(position="learned", seed=0, **changes):
    torch.manual_seed(seed)
    arguments = dict(img_size=OWN, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2)
    return shaken(ViT(position, **(arguments | changes)))


def task(data, teacher, world=ALONE, sizes=(OWN, (16, 12)), **changes):
    view = AugmentConfig(1, True, label_smoothing=0.0)
    images = ImageTask(data, data.native, 24, augment=view, world=world)
    return DistillTask(
        images, teacher, **(dict(own=OWN, sizes=sizes, temperature=2.0, classifier=True, about={}) | changes)
    )


def test_answers_are_compared_by_their_divergence():
    teacher, student, t = randn(5, 7), randn(5, 7, seed=1), 3.0
    p, q = (F.softmax(x / t, -1) for x in (teacher, student))
    close(answers_differ(teacher, student, t), t * t * (p * (p / q).log()).sum(-1).mean())


def test_features_are_compared_by_their_correlation():
    teacher, student = randn(2, 6, 3, 4), randn(2, 6, 3, 4, seed=1)
    pairs = zip(*(x.permute(0, 2, 3, 1).reshape(-1, 6) for x in (teacher, student)), strict=True)
    wanted = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()
    close(features_differ(teacher, student), wanted)
    close(features_differ(teacher, 3 * teacher + 5), torch.tensor(0.0))


def test_features_of_a_compiled_model():
    """Of the first images and, by what is compiled by then, of the next, beside another model; no hook is left."""
    torch.compiler.reset()
    plain = vit("rope", depth=1)
    compiled: torch.nn.Module = torch.compile(plain, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    for seed, stance in enumerate(("default", "fail_on_recompile")):
        images = randn(2, 1, *OWN, seed=seed)
        with torch.compiler.set_stance(stance):
            seen = look(compiled, images)
        for one, other in zip(tensors_of(seen), tensors_of(look(plain, images)), strict=True):
            close(one, other)
        look(vit("rope", seed=1, depth=1), images)
    sum(part.sum() for part in tensors_of(look(compiled, images))).backward()
    gradient = plain.blocks[0].attn.qkv.weight.grad.clone()
    plain.zero_grad()
    sum(part.sum() for part in tensors_of(look(plain, images))).backward()
    close(gradient, plain.blocks[0].attn.qkv.weight.grad)
    assert not any(part._forward_hooks for part in plain.modules())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_are_those_before_pooling(pool):
    model = vit(global_pool=pool, class_token=pool == "token")
    images = randn(2, 1, *OWN)
    seen = look(model, images)
    tokens = model.forward_features(images)
    close(seen.out, model(images))
    close(seen.patches, tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (2, 3)))
    close(seen.pooled, tokens[:, 0] if pool == "token" else tokens.mean(1))
    assert not any(part._forward_hooks for part in model.modules())
    assert len(seen.blocks) == 2
    patches, *leading = seen.blocks[-1]
    whole = torch.cat([*leading, patches.flatten(2)], dim=2).transpose(1, 2)
    close(model.norm(whole), tokens)


@pytest.mark.parametrize("kind", [ViT, Swin])
def test_features_of_blocks_that_are_computed_again_have_the_same_gradients(kind):
    sizes = dict(num_heads=2, depth=3) if kind is ViT else dict(num_heads=(2, 2), depths=(2, 1), window_size=4)
    model = shaken(kind(img_size=(16, 24), patch_size=4 if kind is ViT else 2, embed_dim=16, num_classes=3, **sizes))
    images, found = randn(2, 3, 16, 24), []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        model.zero_grad()
        sum(part.square().mean() for part in tensors_of(look(model.train(), images).blocks)).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_features_of_a_swin_and_none_of_others():
    swin = Swin(img_size=(16, 24), patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4).eval()
    images = randn(1, 3, 16, 24)
    seen = look(swin, images)
    close(seen.patches, swin.forward_features(images).permute(0, 3, 1, 2))
    assert [tuple(patches.shape) for (patches,) in seen.blocks] == [(1, 16, 8, 12), (1, 32, 4, 6)]
    with pytest.raises(ConfigError, match="a MAE"):
        look(MAE(vit(class_token=False, global_pool="avg", num_classes=0, fc_norm=False)), images)


def test_the_teachers_weights_give_no_loss_at_its_size(data):
    teacher = vit()
    alone = task(data, teacher, sizes=(OWN,))
    loss, parts = alone.loss(teacher, alone.batch(0, 0))
    assert abs(float(loss.detach())) < 1e-5
    assert parts.keys() == {"patch_loss", "pooled_loss", "block_loss", "answer_loss"}
    assert alone.evaluate(teacher) == {"test_loss": pytest.approx(0, abs=1e-5), "test_agreement": 100.0}
    other = task(data, teacher, sizes=((16, 12),))
    assert float(other.loss(teacher, other.batch(0, 0))[0].detach()) > 1e-3, "another size is seen, and another grid"


def test_a_model_without_classes_learns_features_alone(data):
    teacher, student = (vit(num_classes=0, seed=seed) for seed in (0, 1))
    headless = task(data, teacher, classifier=False)
    loss, parts = headless.loss(student, headless.batch(0, 0))
    close(loss, parts["patch_loss"] + parts["pooled_loss"] + parts["block_loss"])
    assert headless.evaluate(student).keys() == {"test_loss"}


def test_batches_are_functions_of_their_key_and_two_ranks_have_what_one_has(data):
    """The last one too, which is shorter; every rank draws the same size."""
    teacher, seen = vit(), set()
    for step in range(3):
        whole = task(data, teacher).batch(1, step)
        task(data, teacher).batch(0, step)
        assert all(
            torch.equal(a, b) for a, b in zip(whole.values(), task(data, teacher).batch(1, step).values(), strict=True)
        )
        parts = [task(data, teacher, World(rank, 2)).batch(1, step) for rank in range(2)]
        for name, value in whole.items():
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, atol=1e-6, rtol=0)
        assert whole["images"].shape[2:] == OWN
        seen |= {tuple(task(data, teacher).batch(epoch, step)["seen"].shape[2:]) for epoch in range(4)}
    assert seen == {OWN, (16, 12)}


def test_it_learns_and_leaves_the_teacher_alone(data, tmp_path):
    teacher = vit().requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = vit("rope", seed=1)
    learning = task(data, teacher)
    first = learning.evaluate(student)["test_loss"]
    rows = fit(
        student, learning, OptimConfig(lr=3e-3, epochs=8, batch_size=24), RunConfig(device="cpu"), folder=tmp_path
    )
    assert rows[-1]["test_loss"] < 0.5 * first
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert not teacher.training


def test_features_behind_blocks_are_compared_in_units_of_the_teachers_spread(data):
    teacher, student = vit(), vit("rope", seed=1)
    alone = task(data, teacher, sizes=(OWN,))
    batch = alone.batch(0, 0)
    parts = alone.loss(student, batch)[1]
    assert len(alone.spreads) == 2
    seen = look(teacher, batch["images"])
    for spread, block in zip(alone.spreads, seen.blocks, strict=True):
        within(0.2)(spread, torch.cat([x.flatten(2) for x in block], 2).movedim(1, -1).flatten(0, 1).std(0))
    wanted = 0.0
    for spread, one, other in zip(alone.spreads, seen.blocks, look(student, batch["images"]).blocks, strict=True):
        for a, b in zip(one, other, strict=True):
            wanted += ((a - b) / spread.view(1, -1, *[1] * (a.ndim - 2))).square().mean() * 30 / 2
    close(parts["block_loss"] / wanted, torch.tensor(1.0))


def test_one_image_and_constant_channels_have_a_spread():
    features = torch.zeros(1, 3, 1, 1)
    features[:, 0] = 2.0
    seen = look(vit(), randn(1, 1, *OWN))._replace(blocks=((features,),))
    assert 0 < float(spreads(seen)[0].min()) < 0.1
