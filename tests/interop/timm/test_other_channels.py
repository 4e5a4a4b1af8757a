"""Weights for other channels and other classes than the file's: adapted as timm does, and said."""

import logging

import pytest
import timm
import torch
from timm.models import adapt_input_conv

import vit2dpe.models  # noqa: F401 - registers the names with timm
from tests.helpers import randn, shaken
from tests.interop.timm import originals
from vit2dpe import CheckpointError, from_timm
from vit2dpe.models import MAE, Swin, ViT
from vit2dpe.training.initial_weights import load_weights

# timm resizes BEiT's table to its own size.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning"),
]
SMALL = dict(depth=2, embed_dim=48, num_heads=3, img_size=56)
STAGES = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, img_size=64)
ORIGINALS = {
    "vit_tiny_patch16_224": lambda model: dict(model.state_dict()),
    "vit_small_patch14_reg4_dinov2": originals.dinov2,
    "vit_base_patch32_clip_224": originals.clip,
    "eva02_tiny_patch14_224": lambda model: dict(model.state_dict()),
    "beit_base_patch16_224": lambda model: dict(model.state_dict()),
    "vit_relpos_small_patch16_224": lambda model: dict(model.state_dict()),
    "deit3_small_patch16_224": originals.deit,
    "swin_tiny_patch4_window7_224": originals.swin,
    "swinv2_tiny_window8_256": originals.swin,
}


def sizes_of(name, **more):
    return (STAGES if "swin" in name else SMALL) | (dict(img_size=64) if "14" not in name else {}) | more


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def as_timm_loads(name, original, classes, **more):
    overlay = dict(state_dict=original, num_classes=classes, input_size=(3, 224, 224))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **more).eval()


@pytest.mark.need("B4")
@pytest.mark.parametrize(
    ("name", "channels"),
    [("vit_tiny_patch16_224", 2), ("vit_tiny_patch16_224", 4), *((name, n) for name in ORIGINALS for n in (1, 13))],
)
@torch.no_grad()
def test_other_channels(name, channels, caplog):
    sizes = sizes_of(name, num_classes=5)
    original = ORIGINALS[name](shaken(timm.create_model(name, **sizes)))
    sizes |= dict(in_chans=channels)
    with caplog.at_level(logging.WARNING):
        ours = from_timm(name, weights=original, **sizes).eval()
    assert f"patch_embed.proj.weight adapted from 3 to {channels} channels" in caplog.text
    x = randn(2, channels, sizes["img_size"], sizes["img_size"])
    same(ours(x), as_timm_loads(name, original, 5, **sizes)(x))
    assert ours.in_chans == channels


@pytest.mark.need("B4")
@torch.no_grad()
def test_the_files_own_channels_stay():
    name, sizes = "vit_tiny_patch16_224", sizes_of("16", num_classes=5, in_chans=13)
    theirs = shaken(timm.create_model(name, **sizes))
    x = randn(2, 13, 64, 64)
    same(from_timm(name, weights=theirs.state_dict(), **sizes)(x), theirs(x))
    less = from_timm(name, weights=theirs.state_dict(), **sizes | dict(in_chans=3))
    kernel = adapt_input_conv(3, theirs.patch_embed.proj.weight, base_chans=13)
    torch.testing.assert_close(less.patch_embed.proj.weight, kernel)


@pytest.mark.need("B4")
@pytest.mark.parametrize("name", [*ORIGINALS, "deit_tiny_distilled_patch16_224"])
@torch.no_grad()
def test_other_classes(name, caplog):
    """A new head beside the file's body; without a word of how many, the file's head is not thrown away."""
    sizes = sizes_of(name)
    theirs = shaken(timm.create_model(name, **sizes, num_classes=5))
    original = ORIGINALS.get(name, originals.deit)(theirs)
    with caplog.at_level(logging.WARNING):
        ours = from_timm(name, weights=original, **sizes, num_classes=7).eval()
    assert "drawn anew, for 7 classes: head" in caplog.text
    assert ours(randn(1, 3, sizes["img_size"], sizes["img_size"])).shape == (1, 7)
    x = randn(2, 3, sizes["img_size"], sizes["img_size"])
    same(ours.forward_features(x), theirs.forward_features(x))
    without = from_timm(name, weights=original, **sizes, num_classes=0).eval()
    same(without.forward_features(x), theirs.forward_features(x))
    if timm.create_model(name, **sizes).num_classes:
        with pytest.raises(CheckpointError, match=r"head for 5 classes, .* num_classes=5 keeps it, num_classes=\d+"):
            from_timm(name, weights=original, **sizes)


def test_other_shapes_are_named():
    name, sizes = "vit_tiny_patch16_224", sizes_of("16", num_classes=5)
    theirs = timm.create_model(name, **sizes)
    with pytest.raises(CheckpointError, match=r"of other shapes, cls_token \(1, 1, 48\) for \(1, 1, 96\)"):
        from_timm(name, weights=theirs.state_dict(), **sizes | dict(embed_dim=96))


OURS = {
    "vit": lambda **more: ViT("rope", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, **more),
    "swin": lambda **more: Swin(img_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
                                window_size=4, **more),
}  # fmt: skip


@pytest.mark.need("B4a")
@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_init_of_a_training(kind, channels, tmp_path):
    trained = shaken(OURS[kind](num_classes=5))
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    model = OURS[kind](num_classes=7, in_chans=channels).eval()
    head = [value.clone() for value in model.head.parameters()]
    said = load_weights(model, tmp_path / "weights.pth")
    assert said.adapted == ("patch_embed.proj.weight",)
    assert "adapted to other channels: patch_embed.proj.weight; drawn anew: head" in str(said)
    kernel = adapt_input_conv(channels, trained.patch_embed.proj.weight)
    torch.testing.assert_close(model.patch_embed.proj.weight, kernel)
    assert all(torch.equal(a, b) for a, b in zip(head, model.head.parameters(), strict=True))


@pytest.mark.need("B4a")
@torch.no_grad()
def test_init_of_a_masked_pretraining_and_of_timms_models(tmp_path):
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    mae = shaken(MAE(ViT("sincos", **sizes), decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2))
    torch.save(mae.state_dict(), tmp_path / "mae.pth")
    model = ViT("sincos", **sizes, in_chans=1)
    assert load_weights(model, tmp_path / "mae.pth").adapted == ("patch_embed.proj.weight",)
    kernel = mae.encoder.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, kernel)
    theirs = timm.create_model("test_resnet", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    other = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    assert load_weights(other, tmp_path / "resnet.pth").adapted == (f"{theirs.pretrained_cfg['first_conv']}.weight",)


@pytest.mark.need("B4a")
@pytest.mark.parametrize("name", ["vit2dpe_tiny_patch8_64", "vit2dpe_swin_tiny_patch2_window4_32"])
@torch.no_grad()
def test_timms_door_to_our_names(name):
    less = dict(depths=(1, 1, 1)) if "swin" in name else dict(depth=1)
    trained = shaken(timm.create_model(name, num_classes=5, **less))
    overlay = dict(state_dict=dict(trained.state_dict()), num_classes=5)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=13, num_classes=7, **less)
    kernel = adapt_input_conv(13, trained.patch_embed.proj.weight)
    torch.testing.assert_close(model.patch_embed.proj.weight, kernel)
    assert model.num_classes == 7
    torch.testing.assert_close(dict(model.named_parameters())["norm.weight"], trained.norm.weight)
