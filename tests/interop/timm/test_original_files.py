"""Original files that timm reads, ours reads: each with the logits that timm's own loader gives."""

import pytest
import timm
import torch
from torch import nn

from tests.helpers import randn
from tests.interop.timm import originals
from vit2dpe import CheckpointError, ViT, from_timm
from vit2dpe.interop.timm.read import read
from vit2dpe.training.initial_weights import load_weights

SMALL = dict(depth=2, embed_dim=48, num_heads=3)
STAGES = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4))


def create(name, **more):
    torch.manual_seed(0)
    model = timm.create_model(name, **(STAGES if "swin" in name else SMALL) | more).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def as_timm_loads(name, original, **more):
    """timm's own loader, with the class count of the file; `original` is a state_dict or a path."""
    given = dict(state_dict=original) if isinstance(original, dict) else dict(file=str(original))
    overlay = given | dict(num_classes=more["num_classes"], custom_load=not isinstance(original, dict))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **more).eval()


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# What is made of a timm model, and further arguments of it.
FILES = {
    "vit_small_patch14_dinov2": (originals.dinov2, {}),
    "vit_small_patch14_reg4_dinov2": (originals.dinov2, {}),
    "vit_giant_patch14_dinov2": (originals.dinov2, {}),
    "vit_giant_patch14_reg4_dinov2": (originals.dinov2, {}),
    "vit_base_patch14_reg1_tipsv2": (originals.tips, {}),
    "vit_small_patch16_dinov3": (originals.dinov3, {}),
    "beit_base_patch16_224": (originals.pretrained, {}),
    "eva02_tiny_patch14_224": (originals.pretrained, {}),
    "vit_base_patch32_clip_224": (originals.clip, dict(num_classes=7)),
    "vit_base_patch16_clip_quickgelu_224": (originals.clip, dict(num_classes=7)),
    "eva02_base_patch16_clip_224": (originals.eva_clip, dict(num_classes=7)),
    "vit_base_patch16_siglip_224": (originals.open_clip(), {}),
    "vit_large_patch16_siglip_256": (originals.open_clip("module.visual.trunk."), {}),
    "vit_base_patch16_siglip_gap_224": (originals.open_clip(), {}),
    "aimv2_large_patch14_224": (originals.aimv2, {}),
    "beit3_base_patch16_224": (originals.beit3, dict(num_classes=7)),
    "vit_huge_patch14_gap_224": (originals.i_jepa, {}),
    "vit_base_patch16_radio_v3": (originals.radio, {}),
    "vit_large_patch16_radio_v3": (originals.radio, {}),
    "deit_tiny_patch16_224": (originals.deit, dict(num_classes=7)),
    "deit_tiny_distilled_patch16_224": (originals.deit, dict(num_classes=7)),
    "deit3_small_patch16_224": (originals.deit, dict(num_classes=7)),
    "vit_pe_core_tiny_patch16_384": (originals.perception_encoder, dict(num_classes=7, num_heads=4, embed_dim=64)),
    "vit_pe_spatial_tiny_patch16_512": (originals.perception_encoder, {}),
    "vit_pe_lang_large_patch14_448": (originals.perception_encoder, {}),
    "swin_tiny_patch4_window7_224": (originals.swin, dict(num_classes=7, window_size=4)),
    "swinv2_tiny_window8_256": (originals.swin, dict(num_classes=7, window_size=4)),
}


@pytest.mark.need("B1")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # timm resizes a table to its own size
@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning")
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_from_timm_reads_them_as_timm_does(name, tmp_path):
    original_of, more = FILES[name]
    side = 56 if "14" in name else 64  # the files are square
    more = dict(img_size=side, num_classes=0) | more
    sizes = (STAGES if "swin" in name else SMALL) | more
    theirs = create(name, **more)
    original = original_of(theirs)
    torch.save(original, tmp_path / "original.pth")
    ours = from_timm(name, weights=tmp_path / "original.pth", **sizes).eval()
    x = randn(2, 3, side, side)
    logits = ours(x)
    if original_of is not originals.pretrained:  # timm leaves a mask token where it is
        same(logits, as_timm_loads(name, dict(original), **sizes)(x))
    if "radio" not in name and "clip" not in name and "_pe_core" not in name and "siglip_gap" not in name:
        same(logits, theirs(x))  # what the file was made of; the others have no bias of the head, or another table
    same(from_timm(name, weights={"model": original}, **sizes).eval()(x), logits)


@pytest.mark.need("B1")
@torch.no_grad()
def test_another_size_of_such_files_is_resized_as_timm_does():
    """FlexiViT's and RADIO's tables bilinearly, the others bicubically."""
    for name, original_of in {
        "flexivit_small": lambda model: dict(model.state_dict()),
        "vit_base_patch16_radio_v3": originals.radio,
        "vit_large_patch16_radio_v3": originals.radio,
        "vit_small_patch14_dinov2": originals.dinov2,
    }.items():
        patch = 14 if "14" in name else 16
        original = original_of(create(name, img_size=4 * patch, num_classes=0))
        sizes = SMALL | dict(img_size=6 * patch, num_classes=0)
        x = randn(2, 3, 6 * patch, 6 * patch)
        same(from_timm(name, weights=original, **sizes)(x), as_timm_loads(name, dict(original), **sizes)(x))


@pytest.mark.need("B1a")
@torch.no_grad()
def test_a_file_of_another_size_is_not_resized_twice(tmp_path):
    """Its table and its kernel as they are, where its own size is asked for: not by way of the name's size."""
    name, sizes = "vit_tiny_patch16_224", SMALL | dict(num_classes=7)
    theirs = create(name, img_size=48, patch_size=8, **sizes)
    asked, x = dict(img_size=48, patch_size=8, **sizes), randn(2, 3, 48, 48)
    file = originals.google_npz(theirs, tmp_path / "original.npz")
    for weights in (theirs.state_dict(), file):
        ours = from_timm(name, weights=weights, **asked)
        assert torch.equal(ours.position.pos_embed.flatten(1, 2), theirs.pos_embed[:, 1:])
        assert torch.equal(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
        same(ours(x), theirs(x))


NPZ = {
    "vit_tiny_patch16_224": dict(num_classes=7),
    "vit_base_patch32_224": dict(num_classes=7, prefix="opt/target/"),
    "vit_base_patch16_siglip_224": dict(big_vision=True, prefix="params/img/"),
    "vit_base_patch16_siglip_256": dict(big_vision=True, prefix="params/"),
    "flexivit_small": dict(num_classes=7, big_vision=True, prefix="params/"),
}


@pytest.mark.need("B1")
@pytest.mark.parametrize("name", NPZ)
@torch.no_grad()
def test_google_npz(name, tmp_path):
    more = dict(NPZ[name])
    layout = {key: more.pop(key) for key in ("big_vision", "prefix") if key in more}
    sizes = SMALL | dict(img_size=64, num_classes=0) | more
    theirs = create(name, **sizes)
    file = originals.google_npz(theirs, tmp_path / "original.npz", **layout)
    x = randn(2, 3, 64, 64)
    logits = from_timm(name, weights=file, **sizes)(x)
    same(logits, theirs(x))
    same(logits, as_timm_loads(name, file, **sizes)(x))
    other = sizes | dict(img_size=96, in_chans=1)
    x = randn(2, 1, 96, 96)
    same(from_timm(name, weights=file, **other)(x), as_timm_loads(name, file, **other)(x))


@pytest.mark.need("B1")
def test_npz_that_does_not_fit(tmp_path):
    sizes = SMALL | dict(img_size=64, num_classes=7)
    file = originals.google_npz(create("vit_tiny_patch16_224", **sizes), tmp_path / "original.npz")
    with pytest.raises(CheckpointError, match=r"missing blocks\.0\.ls1\.gamma"):
        from_timm("vit_tiny_patch16_224", weights=file, init_values=1.0, **sizes)
    with pytest.raises(CheckpointError, match=r"no file of Google's ViTs that fits this model"):
        from_timm("vit_tiny_patch16_224", weights=file, **sizes | dict(depth=3))
    with pytest.raises(CheckpointError, match=r"timm reads no \.npz for Eva"):
        from_timm("eva02_tiny_patch14_224", weights=file, **sizes | dict(img_size=56))
    with pytest.raises(CheckpointError, match="there is no file"):
        from_timm("vit_tiny_patch16_224", weights=tmp_path / "none.npz", **sizes)


DINOV2 = [name for name, (of, _) in FILES.items() if of is originals.dinov2]


@pytest.mark.need("B1")
@pytest.mark.parametrize("name", DINOV2)
@torch.no_grad()
def test_a_vit_reads_dinov2_itself(name, tmp_path):
    theirs = create(name, img_size=(56, 84), num_classes=0)
    original, x = originals.dinov2(theirs), randn(2, 3, 56, 84)
    torch.save({"teacher": 1, "state_dict": original}, tmp_path / "weights.pth")
    recipe = read(theirs)
    for load in (
        lambda model: model.load_state_dict(original),
        lambda model: load_weights(model, tmp_path / "weights.pth"),
    ):
        ours = ViT("learned", **recipe.arguments).eval()
        load(ours)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)
