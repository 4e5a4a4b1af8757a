"""Another size for good while a training has begun: the parameters stay the ones that an optimizer was given."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.helpers import randn
from vit2dpe import ENCODINGS, MAE, Swin, ViT

pytestmark = pytest.mark.need("B12")
MICRO = dict(img_size=(16, 24), patch_size=8, embed_dim=48, depth=2, num_heads=3)
WIDE = (32, 40)
WINDOWS = dict(img_size=(16, 24), patch_size=2, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4)


def named(model: nn.Module) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters()}


def vit(position="learned+relative", **more):
    torch.manual_seed(0)
    return ViT(position, **MICRO, num_classes=5, **more)


def swin(position="relative+learned", **more):
    torch.manual_seed(0)
    return Swin(position, **WINDOWS, num_classes=5, **more)


def mae(position="learned+relative"):
    torch.manual_seed(0)
    encoder = ViT(position, **MICRO, num_classes=0)
    return MAE(encoder, decoder_position="factorized", decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)


CHANGES = {
    "another size": (vit, dict(img_size=WIDE)),
    "another patch": (vit, dict(patch_size=(4, 2))),
    "both": (vit, dict(img_size=WIDE, patch_size=4)),
    "its own size": (vit, dict(img_size=(16, 24))),
    "windowed": (lambda: vit("windowed(window=2)"), dict(img_size=(32, 48))),
    "windows": (swin, dict(img_size=(32, 48), window_size=6)),
    "windows, patch": (swin, dict(patch_size=4, window_size=3)),
    "both halves": (mae, dict(img_size=WIDE)),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES)
def test_an_optimizer_made_before_trains_everything(make, change):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reference = copy.deepcopy(model)
    reference.set_input_size(**change)
    held, before = named(model), copy.deepcopy(model.state_dict())
    model(randn(2, 3, 16, 24))[0].sum().backward()  # gradients of the old shapes are dropped
    model.set_input_size(**change)
    assert named(model) == held
    assert list(model.state_dict()) == list(before)
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.grad is None or one.grad.shape == one.shape, name
    later = torch.optim.AdamW(reference.parameters(), lr=0.01)
    x = randn(2, 3, *change.get("img_size", (16, 24)), seed=1)
    for one, steps in ((model, optimizer), (reference, later)):
        for _ in range(2):
            torch.manual_seed(3)  # masks, dropped paths
            steps.zero_grad()
            out = one(x)
            (out[0] if isinstance(out, tuple) else out.square().mean()).backward()
            steps.step()
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other), name
        start = before[name]
        assert one.shape != start.shape or not torch.equal(one, start), f"{name} was not trained"


@pytest.mark.parametrize("position", ENCODINGS)
def test_no_encoding_makes_other_parameters(position):
    model = vit(position)
    frozen = model.requires_grad_(False) and named(model)
    model.set_input_size(WIDE)
    assert named(model) == frozen
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(randn(1, 3, *WIDE)).shape == (1, 5)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_what_keeps_tensors_of_the_old_shape_says_so(kind):
    """Moments of an optimizer, averages of the weights: nothing goes on silently without the table."""
    model = vit()
    optimizer, averages = kind(model.parameters()), [ModelEmaV3(model), AveragedModel(model)]
    for size in ((16, 24), WIDE):
        model.set_input_size(size)
        optimizer.zero_grad()
        model(randn(2, 3, *size)).sum().backward()
        if size == WIDE:
            with pytest.raises(RuntimeError, match="size"):
                optimizer.step()
            for average, update in zip(averages, ("update", "update_parameters"), strict=True):
                with pytest.raises(RuntimeError, match="size"):
                    getattr(average, update)(model)
                average.module.set_input_size(WIDE)
                getattr(average, update)(model)
            continue
        optimizer.step()
        for average, update in zip(averages, ("update", "update_parameters"), strict=True):
            getattr(average, update)(model)
    for parameter, kept in list(optimizer.state.items()):  # the way round, in docs/timm.md
        if any(value.ndim and value.shape != parameter.shape for value in kept.values() if torch.is_tensor(value)):
            del optimizer.state[parameter]
    optimizer.step()


def test_a_classifier_made_anew_needs_its_optimizer_made_anew():
    """As in timm: a new head is a new parameter."""
    for make in (vit, swin):
        model = make()
        held = named(model)
        model.reset_classifier(3)
        changed = {name for name, one in named(model).items() if held[name] != one}
        assert changed == {name for name in held if name.startswith("head")}
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1)
    held = named(theirs)
    theirs.reset_classifier(3)
    assert {name for name, one in named(theirs).items() if held[name] != one} == {"head.weight", "head.bias"}
