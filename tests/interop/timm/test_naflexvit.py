"""timm's NaFlexViT becomes ours with the same logits, of images of one size and of many, and goes back."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.naflex_dataset import NaFlexMapDatasetWrapper
from timm.data.transforms_factory import transforms_imagenet_eval
from torch.utils.data import DataLoader, Dataset

from vit2dpe import ConfigError, from_timm, to_timm
from vit2dpe.models.mixed import pad

SMALL = dict(depth=2, embed_dim=48, num_heads=3, patch_size=4, num_classes=5, pos_embed_grid_size=(4, 6))
NAMES = timm.list_models(module="naflexvit")
GAP = "naflexvit_base_patch16_gap"
EVA = dict(swiglu_mlp=True, qkv_fused=False, attn_type="eva")
OPTIONS = [
    dict(rope_type="axial", pos_embed="none"),
    dict(rope_type="axial", rope_ref_feat_shape=(5, 5), rope_rotate_half=True),
    dict(rope_type="mixed", pos_embed="factorized"),
    dict(rope_type="mixed", pos_embed="none", rope_grid_indexing="xy"),
    dict(rope_type="dinov3", rope_rotate_half=True),
    dict(embed_proj_type="conv", pos_embed_interp_mode="bilinear", pos_embed_antialias=False),
    dict(pre_norm=True, act_layer="quick_gelu"),
    dict(pos_embed_use_grid_sample=True, pos_embed_antialias=False),
    dict(pos_embed_use_grid_sample=True, pos_embed="factorized", pos_embed_ar_preserving=True),
    EVA,
    dict(class_token=True, global_pool="avgmax", fc_norm=True, pool_include_prefix=True),
    dict(dynamic_img_pad=True, embed_norm_layer="layernorm", global_pool="map", pool_include_prefix=True),
    dict(norm_layer="rmsnorm", qk_norm=True, global_pool="max", use_key_only_attn_mask=True),
]
CASES = [(name, {}) for name in NAMES] + [(GAP, options) for options in OPTIONS]
SIZES = [(16, 24), (20, 12), (8, 40)]  # that of the table, rows above columns, far from square


def create(name, **options):
    """Small, and every parameter away from its start."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            gain = key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "gamma_1", "gamma_2"))
            parameter.copy_(torch.randn_like(parameter) * (1.0 if "pos_embed" in key else 0.2) + gain)
    return model


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@torch.no_grad()
def test_logits_are_timms_and_the_way_back_too(name, options):
    theirs = create(name, **options)
    ours = from_timm(theirs)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        same(ours(x), theirs(x))
    if theirs.embeds.is_linear:  # else it takes images alone
        batch = [torch.randn(3, *size) for size in SIZES]
        naflex = pad(batch, 4, 30)
        logits = theirs(naflex)
        same(ours(batch), logits)
        same(ours(naflex), logits)
    state, before = to_timm(ours), theirs.state_dict()
    assert state.keys() == before.keys()
    assert [key for key in before if not torch.equal(state[key], before[key])] == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(pos_embed_use_grid_sample=True), "sampled for NaFlex batches and resized with antialias for images"),
        (dict(pos_embed_interp_mode="nearest", pos_embed_antialias=False), "a table resized by nearest"),
        (dict(rope_type="mrope", rope_mrope_section=(0, 4, 4)), "a rotary encoding of another kind"),
        (dict(patchify_channels_last=False), "patches whose channels come first"),
        (dict(attn_gated=True), "a gate on the output of attention"),
    ],
)
def test_what_ours_lacks_is_refused(options, why):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{GAP}: .*{re.escape(why)}"):
        from_timm(timm.create_model(GAP, **SMALL | options))


def test_it_is_saved_as_a_model_of_timms(tmp_path):
    theirs = create("naflexvit_base_patch16_parfac_gap")
    ours, x = from_timm(theirs), torch.randn(1, 3, 20, 12)
    timm.models.save_for_hf(ours, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))
    assert to_timm(again).keys() == theirs.state_dict().keys()


class Pictures(Dataset):
    """Of several sizes, as files are."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (20 + 8 * index, 40, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index


@torch.no_grad()
def test_batches_of_timms_loader():
    theirs = create(GAP)
    make = partial(transforms_imagenet_eval, naflex=True)
    data = NaFlexMapDatasetWrapper(
        Pictures(),
        patch_size=4,
        seq_lens=(20, 30),
        max_tokens_per_batch=90,
        batch_divisor=1,
        transform_factory=lambda max_seq_len, patch_size: make(max_seq_len=max_seq_len, patch_size=patch_size),
    )
    labels, padded = [], 0
    for batch, target in DataLoader(data, batch_size=None):
        padded += int((~batch["patch_valid"]).sum())
        same(from_timm(theirs)(batch), theirs(batch))
        labels += target.tolist()
    assert padded
    assert sorted(labels) == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_its_weights_go_in_by_name():
    theirs, x = create("naflexvit_base_patch16_siglip"), torch.randn(1, 3, 20, 12)
    same(from_timm("naflexvit_base_patch16_siglip", weights=theirs.state_dict(), **SMALL)(x), theirs(x))
