"""Another encoding in a trained model: what is kept, what is refused."""

import pytest
import torch

from tests.helpers import randn, shaken, within
from vit2dpe import ConfigError, Swin, ViT
from vit2dpe.interop.exchange import encoding_word, move_weights, with_encoding
from vit2dpe.models.spec import ModelSpec

close = within(1e-5)
VIT = dict(img_size=[16, 24], patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
SWIN = dict(
    img_size=[16, 24], patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], num_classes=7, window_size=4
)


def made(kind, **arguments):
    spec = ModelSpec(kind, arguments)
    torch.manual_seed(0)
    return shaken(spec.build()), spec


def exchanged(model, spec, to):
    new = with_encoding(model, spec, to)
    torch.manual_seed(1)
    built = new.build().eval()
    move_weights(model, built)
    return built, new


@pytest.mark.parametrize(("kind", "arguments"), [("ViT", VIT), ("ViT", VIT | {"embed_norm": True}), ("Swin", SWIN)])
def test_what_all_places_have_in_common_is_kept(kind, arguments):
    """A table of equal rows is a bias: without it the function is the same."""
    model, spec = made(kind, position="learned", **arguments)
    with torch.no_grad():
        model.position.pos_embed.copy_(randn(model.position.pos_embed.shape[-1]).expand_as(model.position.pos_embed))
    new, _ = exchanged(model, spec, "none")
    images = randn(2, 3, 16, 24)
    close(new(images), model(images))
    assert not any("position" in name for name in new.state_dict())


def test_of_a_formula_too():
    """The mean over places of what reaches the first block is that of before."""
    model, spec = made("ViT", position="sincos", **VIT)
    new, _ = exchanged(model, spec, "learned")
    images = randn(1, 3, 16, 24)
    before, after = (one.embed(images)[0][:, 1:].mean(1) for one in (model, new))
    close(after, before)


def test_terms_that_both_have_keep_weights_and_options():
    model, spec = made("ViT", position="learned(resize=dino)", **VIT)
    new, built = exchanged(model, spec, "rope+learned")
    assert built.arguments["position"] == "rope+learned(resize=dino)"
    torch.testing.assert_close(new.position.terms[1].pos_embed, model.position.pos_embed)
    torch.testing.assert_close(new.patch_embed.proj.bias, model.patch_embed.proj.bias, atol=1e-6, rtol=0)


def test_every_other_weight_is_the_old_one():
    model, spec = made("ViT", position="relative", **VIT)
    new, _ = exchanged(model, spec, "rope")
    old = {name: value for name, value in model.state_dict().items() if "position" not in name}
    assert old.keys() == new.state_dict().keys()
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.items())


def test_it_is_built_at_the_size_it_has_and_without_dropout():
    model, spec = made("ViT", position="learned", drop_path_rate=0.1, **VIT)
    model.set_input_size((24, 16))
    new, built = exchanged(model, spec, "relative")
    assert new.train_grid == (3, 2)
    assert built.arguments["drop_path_rate"] == 0


@pytest.mark.parametrize(
    ("kind", "arguments", "to", "why"),
    [
        ("ViT", VIT, "learned", "already"),
        ("ViT", VIT, "roep", "did you mean 'rope'"),
        ("ViT", VIT | dict(embed_dim=45), "rope", "multiple"),
    ],
)
def test_what_cannot_be_is_refused(kind, arguments, to, why):
    model, spec = made(kind, **arguments)
    with pytest.raises(ConfigError, match=why):
        with_encoding(model, spec, to)


def test_the_word_of_a_model_that_names_none():
    assert encoding_word(ViT(**VIT), ModelSpec("ViT", VIT)) == "learned"
    assert encoding_word(Swin(**SWIN), ModelSpec("Swin", SWIN)) == "relative"
