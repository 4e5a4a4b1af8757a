"""SimMIM: hidden pixels are not seen and alone count, units and rectangles, for every encoding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import randn
from vit2dpe import ENCODINGS, ConfigError, Swin, ViT, set_policy, use_policy
from vit2dpe.models.simmim import SimMIM
from vit2dpe.resolution.apply import policies_of
from vit2dpe.testing import randomise

SIZE = (16, 48)  # units of 8 x 16: 2 rows and 3 columns; patches of 4 x 8


def micro(position="sincos", mask_unit=(8, 16), **changes):
    torch.manual_seed(0)
    sizes = dict(img_size=SIZE, patch_size=(4, 8), in_chans=2, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    return SimMIM(ViT(position, **{**sizes, **changes}), mask_unit=mask_unit)


def pictures(size=SIZE, batch=3):
    return randn(batch, 2, *size, seed=1)


def noise(batch=3, n=6):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(2))


@pytest.mark.one_of_each_kind
@pytest.mark.parametrize("position", ENCODINGS)
def test_trains_in_rectangles_and_sees_no_hidden_pixel(position):
    model = micro(position)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss, prediction, mask = model(pictures(), noise=noise())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert prediction.shape == (3, 2, *SIZE)
    assert mask.sum(dim=1).tolist() == [4] * 3  # ceil(0.6 x 6)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.eval()
        images = pictures()
        hidden = model.spread(mask, images, (1, 1))[:, None]
        before, after = model(images, noise=noise()), model(torch.where(hidden, 9.0, images), noise=noise())
        assert torch.equal(before[1], after[1])
        assert not torch.equal(before[0], after[0])
        other = model(pictures((8, 64)), noise=noise(n=4))
        assert other[1].shape == (3, 2, 8, 64)


@pytest.mark.parametrize("position", ["relative", "sincos+rope_mixed"])
def test_a_swin_is_pretrained_too(position):
    torch.manual_seed(0)
    sizes = dict(img_size=SIZE, patch_size=(4, 8), in_chans=2, embed_dim=16, depths=(2, 2), num_heads=(2, 2))
    model = SimMIM(Swin(position, window_size=2, num_classes=0, **sizes), mask_unit=(8, 16))
    loss, prediction, mask = model(pictures(), noise=noise())
    loss.backward()
    assert prediction.shape == (3, 2, *SIZE)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    hidden = model.spread(mask, pictures(), (1, 1))[:, None]
    with torch.no_grad():
        seen = model.eval()(torch.where(hidden, 9.0, pictures()), noise=noise())
        assert torch.equal(seen[1], model(pictures(), noise=noise())[1])


@pytest.mark.parametrize("word", ["keep", "scale", "interpolate", "scale+interpolate", "scale+ntk"])
@torch.no_grad()
def test_policies_are_those_of_the_swin_within(word):
    torch.manual_seed(0)
    sizes = dict(img_size=SIZE, patch_size=(4, 8), in_chans=2, embed_dim=16, depths=(2, 2), num_heads=(2, 2))
    swin = randomise(Swin("rope_mixed", window_size=(2, 3), num_classes=0, **sizes)).eval()
    model, wide = SimMIM(swin, mask_unit=(8, 16)).eval(), pictures((32, 96))
    plain, at_home = swin.forward_features(wide), swin.forward_features(pictures())
    with use_policy(swin, word, temperature="log"):
        expected = swin.forward_features(wide)
    with use_policy(model, word, temperature="log"):
        assert torch.equal(swin.forward_features(wide), expected)
        assert torch.equal(swin.forward_features(pictures()), at_home), "nothing changes at the size of training"
    assert torch.equal(swin.forward_features(wide), plain), "what was there is back"
    assert torch.equal(expected, plain) == ("scale" not in word), "kept windows are those of training"
    assert policies_of(model) == policies_of(swin)
    set_policy(model, word)
    kept = swin.forward_features(wide)
    with use_policy(model, temperature="log"):
        assert torch.equal(swin.forward_features(wide), expected)
    assert torch.equal(kept, swin.forward_features(wide))


def test_a_vit_within_has_no_windows():
    model = micro("rope")
    assert policies_of(model) == policies_of(model.encoder)
    with pytest.raises(ConfigError, match="says what windows do, and SimMIM has none"), use_policy(model, "scale"):
        pass


def test_the_loss_by_a_loop():
    model, images = micro(), pictures()
    loss, prediction, mask = model(images, noise=noise())
    terms = [
        (prediction[b, c, y, x] - images[b, c, y, x]).abs()
        for b in range(3)
        for c in range(2)
        for y in range(16)
        for x in range(48)
        if mask[b, (y // 8) * 3 + x // 16]
    ]
    assert len(terms) == 3 * 2 * 4 * 8 * 16
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_the_head_is_a_convolution_and_a_pixel_shuffle():
    model = micro(patch_size=4, mask_unit=8)
    images = pictures()
    features = torch.randn(3, 1 + 48, 32)
    grid = features[:, 1:].unflatten(1, (4, 12)).movedim(-1, 1)
    expected = nn.PixelShuffle(4)(model.decoder(grid))
    torch.testing.assert_close(model.paint(features, images), expected)


@torch.no_grad()
def test_pictures_and_sameness_under_seeds():
    model, images = micro().eval(), pictures()
    seen = model.reconstruct(images, noise=noise())
    hidden = seen.hidden.expand_as(images)
    assert torch.equal(seen.pasted[~hidden], images[~hidden])
    assert torch.equal(seen.pasted[hidden], seen.painted[hidden])
    first, second = (model(images, generator=torch.Generator().manual_seed(3))[2] for _ in range(2))
    assert torch.equal(first, second)


def test_refusals():
    with pytest.raises(ConfigError, match="num_classes=0"):
        micro(num_classes=3)
    with pytest.raises(ConfigError, match="multiple of the patch 4x8"):
        micro(mask_unit=4)
    with pytest.raises(ConfigError, match="multiple of the mask unit 8x16, got 8x24"):
        micro()(pictures((8, 24)))
    with pytest.raises(ValueError, match=r"\(B, U\) = \(3, 6\)"):
        micro()(pictures(), noise=noise(n=5))


@pytest.mark.parametrize("position", ["learned", "rope_mixed", "relative", "windowed"])
def test_another_size_becomes_its_own_and_a_size_that_units_do_not_fill_is_refused(position):
    model, larger = micro(position), micro(position, img_size=(24, 64))
    with pytest.raises(ConfigError, match="multiple of the mask unit 8x16, got 20x48"):
        model.set_input_size((20, 48))
    assert model.train_grid == (4, 6)  # as it was
    larger.load_state_dict(model.state_dict())
    model.set_input_size((24, 64))
    assert model.train_grid == larger.train_grid == (6, 8)
    images, draw = pictures((24, 64)), noise(n=12)
    with torch.no_grad():
        torch.testing.assert_close(larger.eval()(images, noise=draw)[1], model.eval()(images, noise=draw)[1])
