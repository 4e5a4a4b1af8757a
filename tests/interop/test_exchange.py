"""Another encoding in a trained model: what is kept, what is refused."""

import pytest
import torch

from tests.helpers import randn, shaken, within
from vit2dpe import MAE, ConfigError, ViT
from vit2dpe.interop.exchange import move_weights
from vit2dpe.models.spec import ModelSpec

close = within(1e-5)
VIT = dict(img_size=[16, 24], patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
SWIN = dict(
    img_size=[16, 24], patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], num_classes=7, window_size=4
)


def made(kind, **arguments):
    torch.manual_seed(0)
    return shaken(ModelSpec(kind, arguments).build())


def exchanged(model, kind, **arguments):
    torch.manual_seed(1)
    new = ModelSpec(kind, arguments).build().eval()
    move_weights(model, new)
    return new


@pytest.mark.parametrize(("kind", "arguments"), [("ViT", VIT), ("ViT", VIT | {"embed_norm": True}), ("Swin", SWIN)])
def test_what_all_places_have_in_common_is_kept(kind, arguments):
    """A table of equal rows is a bias: without it the function is the same."""
    model = made(kind, position="learned", **arguments)
    with torch.no_grad():
        model.position.pos_embed.copy_(randn(model.position.pos_embed.shape[-1]).expand_as(model.position.pos_embed))
    new = exchanged(model, kind, position="none", **arguments)
    images = randn(2, 3, 16, 24)
    close(new(images), model(images))
    assert not any("position" in name for name in new.state_dict())


def test_of_a_formula_too():
    """The mean over places of what reaches the first block is that of before."""
    model = made("ViT", position="sincos", **VIT)
    new = exchanged(model, "ViT", position="learned", **VIT)
    images = randn(1, 3, 16, 24)
    before, after = (one.embed(images)[0][:, 1:].mean(1) for one in (model, new))
    close(after, before)


def test_terms_that_both_have_keep_their_weights():
    model = made("ViT", position="learned", **VIT)
    new = exchanged(model, "ViT", position="rope+learned", **VIT)
    torch.testing.assert_close(new.position.terms[1].pos_embed, model.position.pos_embed)
    torch.testing.assert_close(new.patch_embed.proj.bias, model.patch_embed.proj.bias, atol=1e-6, rtol=0)


def test_every_other_weight_is_the_old_one():
    model = made("ViT", position="relative", **VIT)
    new = exchanged(model, "ViT", position="rope", **VIT)
    old = {name: value for name, value in model.state_dict().items() if "position" not in name}
    assert old.keys() == new.state_dict().keys()
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.items())


def test_without_a_bias_the_mean_is_lost_and_no_more():
    model = made("ViT", position="learned", pre_norm=True, **VIT)
    new = exchanged(model, "ViT", position="none", pre_norm=True, **VIT)
    assert new.patch_embed.proj.bias is None
    assert torch.equal(new.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_other_models_are_refused():
    model = made("ViT", position="learned", **VIT)
    with pytest.raises(ConfigError, match=r"without a counterpart: blocks\.1"):
        exchanged(model, "ViT", position="rope", **VIT | dict(depth=1))
    with pytest.raises(ConfigError, match="got a MAE"):
        move_weights(model, MAE(ViT(**VIT | dict(num_classes=0))))
