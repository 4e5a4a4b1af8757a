"""Images of different sizes in one batch: as a list, timm's NaFlex batch, padded, packed; each is what it is alone."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models.detection.image_list import ImageList

from vit2dpe import ENCODINGS, MAE, ConfigError, Swin, ViT, use_policy
from vit2dpe.models.deit import DistilledViT
from vit2dpe.models.mixed import pack, pad, pooled
from vit2dpe.models.simmim import SimMIM
from vit2dpe.resolution.apply import policies_of

SIZES = [(16, 24), (24, 12), (8, 20), (24, 12)]  # that of training, rows above columns, far from square, one again
WORDS = [*ENCODINGS, "learned(keep_aspect=true)", "learned(resize=smooth)", "sincos+alibi", "rope/none"]


def vit(position="rope", kind=ViT, **kwargs):
    """Micro, and every parameter away from its start."""
    torch.manual_seed(0)
    sizes = dict(img_size=(16, 24), patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    model = kind(position, **sizes | kwargs).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def images(dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(3, *size, dtype=dtype) for size in SIZES]


def filled(batch, value=7.0):
    """In the corner of a larger image of something else, and which pixels are theirs."""
    rows, columns = (max(x.shape[axis] for x in batch) for axis in (1, 2))
    pixels, mask = batch[0].new_full((len(batch), 3, rows, columns), value), torch.zeros(len(batch), rows, columns)
    for image, one, own in zip(batch, pixels, mask, strict=True):
        one[:, : image.shape[1], : image.shape[2]] = image
        own[: image.shape[1], : image.shape[2]] = 1
    return pixels, mask


def forms(batch):
    """The same batch in every form that a model takes."""
    pixels, mask = filled(batch)
    naflex = pad(batch, 4, 40)
    naflex["patches"].masked_fill_(~naflex["patch_valid"][..., None], 7.0)
    return dict(
        list=batch,
        packed=pack(batch),
        naflex=naflex,
        padded=dict(pixel_values=pixels, pixel_mask=mask),
        torchvision=ImageList(pixels, [tuple(x.shape[1:]) for x in batch]),
    )


def alone(model, batch):
    return torch.cat([model(image[None]) for image in batch])


@pytest.mark.parametrize("word", WORDS)
@torch.no_grad()
def test_each_image_is_what_it_is_alone(word):
    model, batch = vit(word, reg_tokens=1).double(), images()
    given = forms(batch)
    for number, policy in enumerate(policies_of(model)):
        for temperature in [None, "log"][: 1 if number else 2]:
            with use_policy(model, policy, temperature=temperature):
                expected = alone(model, batch)
                for form in list(given) if number == 0 else ["list", "naflex"]:
                    said = f"{word} {policy} {temperature} {form}"
                    torch.testing.assert_close(
                        model(given[form]), expected, rtol=0, atol=1e-10, msg=lambda m, s=said: s + m
                    )
    single, batch = model.float(), [image.float() for image in batch]
    for form, came in forms(batch).items():
        torch.testing.assert_close(
            single(came), alone(single, batch), rtol=1e-5, atol=1e-5, msg=lambda m, s=form: s + m
        )


POOLS = ["token", "avg", "max", "avgmax", "map"]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_pooling_counts_what_is_valid(pool, prefix):
    model, batch = vit("learned", global_pool=pool, pool_include_prefix=prefix, reg_tokens=2).double(), images()
    given = forms(batch)
    for form in ("list", "naflex", "padded"):
        torch.testing.assert_close(model(given[form]), alone(model, batch), rtol=0, atol=1e-10)


@torch.no_grad()
def test_no_class_token_and_all_tokens_to_the_head():
    model, batch = vit("rope", global_pool="avg", class_token=False, fc_norm=False).double(), images()
    for came in forms(batch).values():
        torch.testing.assert_close(model(came), alone(model, batch), rtol=0, atol=1e-10)
    model.global_pool = ""
    found = model(forms(batch)["naflex"])
    assert found.shape == (4, 40, 5)
    torch.testing.assert_close(found[2, :10], model(batch[2][None])[0], rtol=0, atol=1e-10)
    with pytest.raises(ConfigError, match="tokens of different numbers"):
        model(batch)


@torch.no_grad()
def test_features_are_those_of_each_image():
    model, batch = vit("rope_mixed", reg_tokens=1).double(), images()
    given, each = forms(batch), [model.forward_features(image[None])[0] for image in batch]
    for found, expected in zip(model.forward_features(batch), each, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    padded = model.forward_features(given["naflex"])
    assert padded.keys() == {"patches", "patch_valid"}
    for found, valid, expected in zip(padded["patches"], padded["patch_valid"], each, strict=True):
        torch.testing.assert_close(found[2:][valid], expected[2:], rtol=0, atol=1e-10)
        torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=1e-10)


@torch.no_grad()
def test_intermediates_are_those_of_each_image():
    model, batch = vit("alibi").double(), images()
    last, listed = model.forward_intermediates(batch, indices=[0, 1], return_prefix_tokens=True, norm=True)
    for i, image in enumerate(batch):
        own, blocks = model.forward_intermediates(image[None], indices=[0, 1], return_prefix_tokens=True, norm=True)
        torch.testing.assert_close(last[i], own[0], rtol=0, atol=1e-10)
        for (patches, prefix), (expected, expected_prefix) in zip(listed, blocks, strict=True):
            assert patches[i].shape[1:] == (image.shape[1] // 4, image.shape[2] // 4)
            torch.testing.assert_close(patches[i], expected[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(prefix[i], expected_prefix[0], rtol=0, atol=1e-10)
    naflex = forms(batch)["naflex"]
    found = model.forward_intermediates(naflex, output_fmt="NLC", output_dict=True)
    assert found["image_features"].shape == (4, 41, 48)
    assert torch.equal(found["patch_valid"], naflex["patch_valid"])
    torch.testing.assert_close(found["image_features"][2, :11], last[2], rtol=0, atol=1e-10)
    with pytest.raises(ConfigError, match="a padded batch has no one grid"):
        model.forward_intermediates(naflex)
    (classes,) = model.get_intermediate_layers(batch, return_class_token=True)
    assert classes[1][0].shape == (48,)


@torch.no_grad()
def test_masks_of_timms_beside_a_batch():
    model, batch = vit("rope").double(), images()
    given = forms(batch)
    expected = torch.cat([model(image[None], is_causal=True) for image in batch])
    for form in ("list", "naflex"):
        torch.testing.assert_close(model(given[form], is_causal=True), expected, rtol=0, atol=1e-10)
    mask = torch.rand(4, 1, 41, 41) < 0.5
    mask[..., 0] = True
    counts = [(x.shape[1] * x.shape[2]) // 16 + 1 for x in batch]
    expected = torch.cat(
        [model(x[None], attn_mask=m[None, :, :n, :n]) for x, m, n in zip(batch, mask, counts, strict=True)]
    )
    torch.testing.assert_close(model(given["naflex"], attn_mask=mask), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(given["naflex"] | dict(attn_mask=mask)), expected, rtol=0, atol=1e-10)
    with pytest.raises(ConfigError, match="a list of images has several"):
        model(batch, attn_mask=mask)
    beside, within = (
        model.forward_intermediates(came, output_fmt="NLC", attn_mask=other)
        for came, other in ((given["naflex"], mask), (given["naflex"] | dict(attn_mask=mask), None))
    )
    assert torch.equal(within[0]["patches"], beside[0]["patches"])
    assert torch.equal(within[1][0], beside[1][0])
    mae = MAE(vit(num_classes=0), decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3).double()
    with pytest.raises(ConfigError, match="patches are hidden: leave it out"):
        mae(given["naflex"] | dict(attn_mask=mask))
    dropping = vit(patch_drop_rate=0.3).double().train()
    for came in (batch[0][None], batch, given["naflex"], given["naflex"] | dict(attn_mask=mask)):
        with pytest.raises(ConfigError, match=r"patch_drop_rate \(in training\) and a token_filter"):
            dropping(came, is_causal=True)


@pytest.mark.parametrize("form", ["list", "naflex"])
def test_gradients_are_those_of_the_images_together(form):
    model, batch = vit("learned+relative", global_pool="avg").double(), images()
    model(forms(batch)[form]).square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone(model, batch).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_patch_dropout_keeps_of_each_image_its_own_share():
    model, batch = vit("rope", patch_drop_rate=0.3).train(), images(torch.float32)
    kept = [int(x.shape[1] * x.shape[2] // 16 * 0.7) for x in batch]
    assert [len(x) - 1 for x in model.forward_features(batch)] == kept
    given = forms(batch)
    for form in ("naflex", "padded"):
        assert model.forward_features(given[form])["patch_valid"].sum(1).tolist() == kept
    assert model(given["naflex"]).isfinite().all()


@pytest.mark.parametrize("word", ["rope", "learned", "relative", "rope_mixed"])
@torch.no_grad()
def test_mae_hides_of_each_image_its_own_share(word):
    encoder = vit(word, num_classes=0)
    sizes = dict(decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3)
    model = MAE(encoder, decoder_position=word, norm_pix=True, **sizes).double().eval()
    batch = images()
    noise = [torch.rand(image.shape[1] * image.shape[2] // 16) for image in batch]
    loss, predictions, masks = model(batch, 0.7, noise)
    wrong = hidden = torch.zeros(())
    for image, own, prediction, mask in zip(batch, noise, predictions, masks, strict=True):
        one, expected, expected_mask = model(image[None], 0.7, own[None])
        torch.testing.assert_close(prediction, expected[0], rtol=0, atol=1e-10)
        assert torch.equal(mask, expected_mask[0])
        wrong, hidden = wrong + one * mask.sum(), hidden + mask.sum()
    torch.testing.assert_close(loss, wrong / hidden)
    for form, came in forms(batch).items():
        torch.testing.assert_close(model(came, 0.7, noise)[0], loss, msg=lambda m, s=form: s + m)


def test_mae_learns_from_a_list():
    model = MAE(vit("rope", num_classes=0), decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3).train()
    loss, *_ = model(images(torch.float32), generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Kept:
    """Counts the bytes that are kept for a backward, each storage once; parameters are not counted."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes, self.alive = 0, []

    def __call__(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.alive.append(x)  # so that no address comes twice
            self.bytes += storage.nbytes()
        return x


@pytest.mark.parametrize("word", ["rope", "relative", "fire"])
def test_a_packed_row_keeps_what_its_images_keep(word):
    """No matrix over the row: at most a tenth more than the images one by one."""
    model, batch = vit(word).train(), images(torch.float32) * 4

    def kept(inputs):
        count = Kept(model)
        with saved_tensors_hooks(count, lambda x: x):
            model(inputs).sum()
        return count.bytes

    assert kept(batch) <= 1.1 * sum(kept(image[None]) for image in batch)


@torch.no_grad()
def test_what_is_built_on_a_vit_takes_them_too():
    model, batch = vit("rope", DistilledViT).double(), images()
    for came in forms(batch).values():
        torch.testing.assert_close(model(came), alone(model, batch), rtol=0, atol=1e-10)
    model = vit("learned", dynamic_img_pad=True).double()
    odd = [torch.randn(3, 15, 22, dtype=torch.float64), torch.randn(3, 21, 9, dtype=torch.float64)]
    pixels, mask = filled(odd)
    for came in (odd, dict(pixel_values=pixels, pixel_mask=mask)):
        torch.testing.assert_close(model(came), alone(model, odd), rtol=0, atol=1e-10)


X = torch.zeros(1, 3, 16, 24)
SWIN = dict(img_size=16, patch_size=2, embed_dim=24, depths=(1,), num_heads=(2,), window_size=2)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "one tensor .C, H, W. for each, got an empty list"),
        ([torch.zeros(16, 24)], r"one tensor .C, H, W. for each, got \(16, 24\)"),
        ([torch.zeros(3, 15, 24)], "multiple of the patch 4x4: got 15x24"),
        (dict(images=X), "patches, patch_coord and patch_valid .timm's NaFlex., or pixel_values"),
        (dict(patches=torch.zeros(1, 6, 47), patch_coord=torch.zeros(1, 6, 2)), r"are .B, N, 48. = rows x columns"),
        (dict(patches=torch.zeros(1, 6, 8, 8, 3), patch_coord=torch.zeros(1, 6, 2)), r"patches of \(4, 4\), got \(8"),
        (dict(pixel_values=X, pixel_mask=torch.ones(1, 16, 20)), "pixel_mask .B, H, W., got"),
        (ImageList(X, [(20, 24)]), "has a size .H, W. within it"),
        ("photo.jpg", "a list of .C, H, W., timm's NaFlex batch or a padded one, got str"),
        (3, "a list of .C, H, W., timm's NaFlex batch or a padded one, got int"),
    ],
)
def test_what_is_no_batch_is_refused(given, why):
    with pytest.raises(ConfigError, match=why):
        vit()(given)


def test_where_one_size_is_needed_others_are_refused():
    batch = images(torch.float32)
    fixed = vit(dynamic_img_size=False)
    for form, why in (("naflex", r"it takes \(16, 24\) only"), ("list", r"takes \(16, 24\) images only")):
        with pytest.raises(ConfigError, match=why):
            fixed(forms(batch)[form])
    windows = vit(window=2, global_blocks=(1,))
    for form in ("naflex", "list"):
        with pytest.raises(ConfigError, match="blocks in windows take images of one size"):
            windows(forms(batch)[form])
    swin = Swin("relative", **SWIN)
    simmim = SimMIM(vit(num_classes=0), mask_unit=8)
    mae = MAE(vit(num_classes=0), decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=3)
    for call in (swin, simmim, mae.reconstruct):
        with pytest.raises(ConfigError, match=r"one tensor \(B, C, H, W\)"):
            call(batch)
    cut = forms(batch)["naflex"]
    cut["patch_valid"][0, 3] = False
    with pytest.raises(ConfigError, match="of an image of 4x6 patches 23 came"):
        mae(cut)
    with pytest.raises(ConfigError, match="one tensor for each of 4 images, got 1"):
        mae(batch, noise=[torch.rand(24)])
    with pytest.raises(ConfigError, match=r"one tensor \(B, N\), got list"):
        mae(batch[0][None], noise=[torch.rand(24)])


def test_pad_refuses_what_it_would_cut():
    with pytest.raises(ConfigError, match="at least 24"):
        pad(images(), 4, 20)
    with pytest.raises(ConfigError, match="multiple of the patch 16x16"):
        pad(images(), 16)


FILLED = ["learned", "relative", "rope", "shaw", "t5"]


@pytest.mark.parametrize("word", FILLED)
@torch.no_grad()
def test_what_fills_a_batch_up_may_be_anything_anywhere(word):
    """A canvas larger than the largest image, coordinates outside of every grid, values that are no numbers."""
    model, batch = vit(word, global_pool="avg").double(), images()
    nan, expected = float("nan"), alone(model, batch)
    pixels, mask = filled([*batch, torch.zeros(3, 32, 40, dtype=torch.float64)], nan)
    given = [dict(pixel_values=pixels[:4], pixel_mask=mask[:4]), ImageList(pixels[:4], [x.shape[1:] for x in batch])]
    for outside in (-1, 50):
        naflex = pad(batch, 4, 40)
        naflex["patches"][~naflex["patch_valid"]] = nan
        naflex["patch_coord"][~naflex["patch_valid"]] = outside
        given.append(naflex)
    for came in given:
        torch.testing.assert_close(model(came), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_stochastic_depth_drops_branches_of_each_image():
    """Of two branches of the last block each image keeps its own: all four outcomes, in a list as in a padded batch."""
    model, (one, other) = vit(drop_path_rate=0.5).train(), images(torch.float32)[:2]
    batch = [one, other, one] * 40

    def outcomes(logits):
        return len(((logits[:, None] - logits).abs().amax(-1) < 1e-4).unique(dim=0))

    packed, padded = model(batch), model(pad(batch, 4))
    for i in (0, 1):
        assert outcomes(packed[i::3]) == outcomes(torch.cat([packed[i::3], padded[i::3]])) == 4


def test_pooling_of_halves_does_not_overflow():
    x = torch.full((1, 3000, 4), 40.0, dtype=torch.float16)
    for kind in ("avg", "avgmax"):
        assert torch.equal(pooled(x, kind, torch.ones(1, 3000, dtype=torch.bool)), x[:, 0])
