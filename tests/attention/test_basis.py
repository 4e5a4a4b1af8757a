"""A learned basis of heads changes no product, takes gradients where there is a rotation, and folds away exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import randn, shaken
from vit2dpe import ConfigError, Swin, TextDecoder, ViT, explain
from vit2dpe.attention.basis import HeadBasis, fold_basis, learn_basis

MICRO = dict(img_size=(16, 24), patch_size=4, embed_dim=24, num_heads=2, depth=2, num_classes=5)
IMAGES = randn(2, 3, 16, 24)
KINDS = ["orthogonal", "svd"]


def bases(model):
    return [part for part in model.modules() if isinstance(part, HeadBasis)]


def vit(position="rope", **changes):
    torch.manual_seed(0)
    return shaken(ViT(position, **MICRO | changes), 0.2)


def turned(model, std=0.3):
    """With bases far from the identity."""
    for part in bases(model):
        for i, parameter in enumerate(part.parameters()):
            parameter.data.copy_(randn(*parameter.shape, seed=i) * std)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_folded_it_is_the_same_model_with_the_same_names(kind):
    plain, model = vit(), learn_basis(vit(), kind)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-6)  # it starts as the identity
    learned = turned(model)(IMAGES)
    assert (learned - plain(IMAGES)).abs().max() > 0.01
    to_q, _ = bases(model)[1].bases()
    rows = plain.blocks[1].attn.qkv.weight.unflatten(0, (3, 2, 12))
    expected = torch.stack([to_q @ rows[0], torch.linalg.inv(to_q).mT @ rows[1], rows[2]]).flatten(0, 2)
    fold_basis(model)
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(IMAGES), learned, rtol=0, atol=1e-6)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert explain(model, (16, 24))[0].rotation == explain(plain, (16, 24))[0].rotation
    with pytest.raises(ConfigError, match="learned no basis"):
        fold_basis(model)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_it_where_something_turns(kind):
    model = turned(learn_basis(vit("rope/none", qkv_bias=False), kind))
    model(IMAGES).square().sum().backward()
    first, second = ([p.grad.abs().max() for p in part.parameters()] for part in bases(model))
    assert min(first) > 1e-3
    assert max(second) < 1e-4 * min(first)  # products alone count there


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_products_stay(kind):
    """Without a rotation nothing changes; biases of q and k, which are left alone, are 0 here."""
    plain = vit("alibi", qkv_bias=False)
    model = turned(learn_basis(vit("alibi", qkv_bias=False), kind))
    torch.testing.assert_close(model(IMAGES), plain(IMAGES), rtol=0, atol=1e-5)
    texts = torch.arange(14).view(2, 7)
    small = dict(vocab_size=14, context=9, embed_dim=24, depth=1, num_heads=4, kv_heads=2, bias=False)
    shared = shaken(TextDecoder("none", **small), 0.2)
    before = shared(texts)
    torch.testing.assert_close(turned(learn_basis(shared, kind))(texts), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_it_is_orthogonal_or_has_an_inverse():
    a, again = bases(turned(learn_basis(vit())))[0].bases()
    torch.testing.assert_close(a @ a.mT, torch.eye(12).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert a is again
    assert (a - torch.eye(12)).abs().max() > 0.3
    a, dual = bases(turned(learn_basis(vit(), "svd")))[0].bases()
    torch.testing.assert_close(a @ dual.mT, torch.eye(12).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert (a @ a.mT - torch.eye(12)).abs().max() > 0.3


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ConfigError, match="norms of q and k"):
        learn_basis(vit(qk_norm=True))
    with pytest.raises(ConfigError, match="norms of q and k"):
        learn_basis(
            Swin(img_size=16, patch_size=4, embed_dim=12, depths=(1,), num_heads=(2,), window_size=2, qk="cosine")
        )
    with pytest.raises(ConfigError, match="parametrized already"):
        learn_basis(learn_basis(vit()))
    with pytest.raises(ConfigError, match="did you mean 'svd'"):
        learn_basis(vit(), "svdd")
    with pytest.raises(ConfigError, match="has no Attention of ours"):
        learn_basis(nn.Linear(2, 2))
