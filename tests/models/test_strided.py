"""Patches that overlap: the coordinates of their centres, and at those of training what training had."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

import vit2dpe
from tests.helpers import randn, shaken, within
from vit2dpe import MAE, ConfigError, ViT
from vit2dpe.encodings import ENCODINGS, encodings_of
from vit2dpe.models.predict import preparation_for
from vit2dpe.positions import Positions
from vit2dpe.resolution.apply import policies_of

SIZES = dict(img_size=(24, 40), patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5)
WHOLE = ("decomposed", "shaw", "irpe")  # vectors by offset, which have none between
close = within(1e-5)


def vit(position: str = "rope", **changes: object) -> ViT:
    torch.manual_seed(0)
    return shaken(ViT(position, **SIZES | changes), 0.3)


@torch.no_grad()
def test_centres_are_where_they_are_in_the_image():
    at = vit(patch_stride=(4, 2)).positions(32, 40)
    assert at.extent == (7, 17)
    assert at.coords.unflatten(1, at.extent)[0, 3, 5].tolist() == [1.5, 1.25]
    assert at.span == pytest.approx((4, 5))  # what it covers, in patches


AXES = "learned(axes=0)+learned(axes=1)"


@pytest.mark.parametrize("word", [*(word for word in ENCODINGS if word not in (*WHOLE, "fire")), AXES])
@torch.no_grad()
def test_patches_of_training_get_what_they_got(word):
    """Every second patch along each axis is one of training: its tokens, rotations and biases are the same.

    Not of `fire`, which divides by the largest distance that a grid of a spacing covers.
    """
    plain, dense = vit(word), vit(word, patch_stride=4)
    dense.load_state_dict(plain.state_dict())
    for size in ((24, 40), (40, 24)):
        images = randn(1, 3, *size)
        rows, columns = dense.patch_embed.grid(*size)
        middles = torch.arange(rows * columns).view(rows, columns)[::2, ::2].flatten()
        fine, coarse = dense.positions(*size).take(middles), plain.positions(*size)
        close(dense.patch_embed(images)[0][:, middles], plain.patch_embed(images)[0])
        for policy in ("default", "interpolate"):
            if size != (24, 40) and policy == "default" and "resize" in policies_of(plain):
                continue  # a table that is resized is not what is read between its entries
            if policy != "default" and policy not in policies_of(plain):
                continue
            with vit2dpe.use_policy(plain, policy), vit2dpe.use_policy(dense, policy):
                for ours, theirs in zip(encodings(dense), encodings(plain), strict=True):
                    one, other = ours(fine), theirs(coarse)
                    for x, y in ((one.token, other.token), (one.q_rotation, other.q_rotation)):
                        assert (x is None) == (y is None)
                        if x is not None and y is not None:
                            close(x[0] if isinstance(x, tuple) else x, y[0] if isinstance(y, tuple) else y)
                    for x, y in zip(one.bias, other.bias, strict=True):
                        close(x.dense(), y.dense(), 1e-4)


def encodings(model: ViT) -> list[torch.nn.Module]:
    owned = [block.attn.position for block in model.blocks]
    return [model.position, *(one for one in owned if one is not None)]


@torch.no_grad()
def test_the_patch_as_stride_is_the_plain_model_and_less_gives_a_denser_grid():
    plain, same, dense = vit("learned+rope"), vit("learned+rope", patch_stride=8), vit("learned+rope", patch_stride=4)
    images = randn(2, 3, 24, 40)
    assert torch.equal(plain(images), same(images))
    assert {name: value.shape for name, value in dense.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    found = dense.forward_intermediates(images, intermediates_only=True)
    assert found[0].shape == (2, 48, 5, 9)
    assert dense.feature_info[0]["reduction"] == 4
    dense.set_input_size((40, 24))
    assert dense.train_grid == (5, 3)
    assert dense(images).shape == (2, 5)
    spaced = vit("rope", patch_stride=4)
    with vit2dpe.use_policy(spaced, "interpolate"):
        close(spaced(images, spacing=0.5), vit2dpe_half(spaced, images))


def vit2dpe_half(model: ViT, images: torch.Tensor) -> torch.Tensor:
    """Under `interpolate`, which follows what the grid covers, half of training."""
    x, at = model.patch_embed(images)
    at = Positions((at.coords + 0.5) * 0.5 - 0.5, at.extent, spacing=tuple(s * 0.5 for s in at.spacing)).with_prefix(1)
    signal = model.position(at)
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1)
    for block in model.blocks:
        x = block(x, signal, at)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("word", ["learned", "relative", AXES])
@torch.no_grad()
def test_another_size_for_good_is_what_tables_are_read_by(word):
    model, images = vit(word, patch_stride=4), randn(1, 3, 40, 24)
    for size in ((40, 24), (24, 24), (40, 24)):
        model.set_input_size(size)
    fresh = vit(word, patch_stride=4, img_size=(40, 24))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(images), fresh(images))
    vit2dpe.set_policy(model, "interpolate(power=0.5)")
    model.set_input_size((24, 40))
    assert all(one.own_policy.power in (0.5, (0.5,)) for one in encodings_of(model))


def test_a_patch_below_the_stride_leaves_the_model_as_it_was():
    model = vit("learned", patch_stride=4)
    before = model.patch_embed.proj.weight.clone()
    with pytest.raises(ConfigError, match="at most patch_size"):
        model.set_input_size(patch_size=2)
    assert torch.equal(model.patch_embed.proj.weight, before)
    assert model.train_grid == (3, 5)


@torch.no_grad()
def test_pictures_at_their_own_aspect_ratio_are_as_large_as_those_of_training():
    sizes = []
    for model in (vit("rope"), vit("rope", patch_stride=4)):
        prepare = preparation_for(model, None, "native", None, None)
        sizes.append([x.shape for x in prepare([np.zeros((60, 90, 3), np.uint8)])])
    assert sizes[0] == sizes[1]
    assert len(model.predict([np.zeros((60, 90, 3), np.uint8)], k=1, fit="native")) == 1
    with pytest.raises(ConfigError, match=r"max_tokens.*patch_stride"):
        model.predict([np.zeros((60, 90, 3), np.uint8)], k=1, fit="native", max_tokens=15)


@torch.no_grad()
def test_windows_of_patches_that_overlap():
    model = vit("rope+alibi", patch_stride=4, window=3, global_blocks=(1,))
    around = vit("rope+alibi", patch_stride=4, window=(5, 9), global_blocks=(1,))
    assert not torch.allclose(model(randn(1, 3, 24, 40)), around(randn(1, 3, 24, 40)), atol=1e-4)


@torch.no_grad()
def test_weights_of_timm_and_back_from_a_folder(tmp_path):
    theirs = shaken(timm.models.vision_transformer.VisionTransformer(**SIZES | dict(num_heads=3)))
    model = vit2dpe.from_timm(theirs, patch_stride=4)
    images = randn(1, 3, 24, 40)
    assert model.forward_intermediates(images, intermediates_only=True)[0].shape[2:] == (5, 9)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))


@torch.no_grad()
def test_one_graph():
    model = vit("learned+rope", patch_stride=4, depth=1)
    images = randn(1, 3, 24, 40)
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images))
    torch._dynamo.reset()


def test_what_does_not_fit_is_refused():
    for arguments, message in (
        (dict(patch_stride=9), "at most patch_size"),
        (dict(patch_stride=0), "at least 1"),
        (dict(patch_stride=(4, 4, 4)), "two"),
    ):
        with pytest.raises(ConfigError, match=message):
            vit(**arguments)
    with pytest.raises(ConfigError, match="must end where the image does: got 26x40; nearest: 28x40"):
        vit(patch_stride=4)(randn(1, 3, 26, 40))
    assert vit(patch_stride=4, dynamic_img_pad=True).patch_embed.grid(26, 40) == (6, 9)
    assert vit(patch_stride=4, dynamic_img_pad=True)(randn(1, 3, 26, 40)).shape == (1, 5)
    with pytest.raises(ConfigError, match="show what is hidden"):
        MAE(vit(patch_stride=4, num_classes=0))
    for word in WHOLE:
        with pytest.raises(ValueError, match="whole"):
            vit(word, patch_stride=4)(randn(1, 3, 24, 40))
