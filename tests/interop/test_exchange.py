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
    new = exchanged(model, "ViT", position="alibi", **VIT)
    old = {name: value for name, value in model.state_dict().items() if "position" not in name}
    assert old.keys() == new.state_dict().keys()
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.items())


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ViT", VIT),
        ("ViT", VIT | dict(qkv_bias=False)),
        ("ViT", VIT | dict(qkv_bias="qv")),
        ("ViT", VIT | dict(reg_tokens=2, global_pool="token")),
        ("Swin", SWIN),
        ("Swin", SWIN | dict(post_norm=True)),
    ],
)
@pytest.mark.parametrize("word", ["rope", "rope_mixed"])
def test_bases_of_heads_change_no_product(kind, arguments, word):
    """Where a rotation comes to heads that had none, queries and keys have another basis, in which they are alike."""
    model = made(kind, position="none", **arguments).double()
    new = ModelSpec(kind, dict(position=word, **arguments)).build().double().eval()
    move_weights(model, new)
    still = ModelSpec(kind, dict(position="none", **arguments)).build().double().eval()
    still.load_state_dict({name: value for name, value in new.state_dict().items() if "position" not in name})
    images = randn(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(still(images), model(images), atol=1e-9, rtol=0)
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, still.state_dict()[n])]
    assert changed
    assert all(".qkv." in name or name.endswith("q_bias") for name in changed)


def test_what_a_head_looks_for_lies_where_the_rotation_turns_least():
    model = made("ViT", position="learned", **VIT)
    with torch.no_grad():
        for block in model.blocks:
            rows = block.attn.qkv.weight.view(3, 3, 16, 48)[:2]
            rows[:, :, 2:] = rows[:, :, :2].repeat(1, 1, 7, 1) / 2  # of rank 2
    new = exchanged(model, "ViT", position="rope", **VIT)
    cos, sin = new.position(new.positions(16, 24)).q_rotation
    least = int(torch.hypot(cos.mean(2), sin.mean(2)).flatten().argmax())
    for block in new.blocks:
        size = block.attn.qkv.weight.view(3, 3, 8, 2, 48)[:2].norm(dim=(3, 4))  # of each pair
        assert (size[:, :, least] > 1e3 * size.sum(2).sub(size[:, :, least])).all()


@pytest.mark.parametrize(
    ("kind", "old", "word", "arguments"),
    [
        ("ViT", "rope", "rope_mixed", VIT),
        ("ViT", "learned", "relative", VIT),
        ("ViT", "learned", "rope", VIT | dict(qk_norm=True)),
        ("Swin", "relative", "rope", SWIN | dict(qk="cosine")),
    ],
)
def test_heads_that_turned_before_or_count_by_more_than_products_keep_theirs(kind, old, word, arguments):
    model = made(kind, position=old, **arguments)
    new = exchanged(model, kind, position=word, **arguments)
    kept = [name for name in model.state_dict() if ".qkv." in name]
    assert kept
    assert all(torch.equal(model.state_dict()[name], new.state_dict()[name]) for name in kept)


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
