"""Every name of timm's ends in a model of ours or in a ConfigError that says why; other ways to hold a timm model."""

import re
import warnings
from collections import Counter

import pytest
import timm
import torch

from vit2dpe import ConfigError, from_timm
from vit2dpe.interop.timm.read import FAMILIES, SWINS

# One of each module or family that has something of the covered ones, and a few that have nothing of them.
NAMES = {
    "test_vit": "ViT",
    "vit_tiny_patch16_224": "ViT",
    "vit_small_patch16_dinov3": "ViT",
    "vit_pe_core_tiny_patch16_384": "ViT",
    "vit_small_patch16_rope_ape_224": "ViT",
    "deit_tiny_distilled_patch16_224": "DistilledViT",
    "beit_base_patch16_224": "ViT",
    "test_vit_relpos": "ViT",
    "swin_tiny_patch4_window7_224": "Swin",
    "swinv2_tiny_window8_256": "Swin",
    "vitamin_small_224": "an MLP of another kind .GeGluMlp.*nearest covered name: vit_small",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock.*nearest covered name: vit_small_patch",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention.*nearest covered name: vit_wee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_base_patch16_sapiens2": "a bias of q, k and v in maps of their own",
    "vit_tiny_r_s16_p8_224": "a patch embedding that is not one convolution",
    "vit_base_mci_224": "a patch embedding that is not one convolution",
    "vit_so400m_patch14_siglip_384": "no multiple of its patch 14x14.*img_size=.378, 378.",
    "samvit_base_patch16": "VisionTransformerSAM is not covered; covered are timm's VisionTransformer, .*SwinTrans",
    "naflexvit_base_patch16_gap": "ViT",
    "swinv2_cr_tiny_224": "SwinTransformerV2Cr is not covered.*nearest covered name: swinv2_tiny_window8_256",
    "test_resnet": "ResNet is not covered",
    "volo_d1_224": "VOLO is not covered",
    "vit2dpe_tiny_patch4_32": "a ViT is a model of ours already",
}


def on_meta(name):
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # timm draws parameters that have no data
        return timm.create_model(name)


def outcome(name, theirs):
    """Our class, or the words of a ConfigError; any other error is raised."""
    try:
        ours = from_timm(theirs)
    except ConfigError as error:
        return str(error)
    assert next(ours.parameters()).is_meta
    return type(ours).__name__


@pytest.mark.need("B7")
@pytest.mark.parametrize("name", NAMES)
def test_one_of_each_kind(name):
    found, expected = outcome(name, on_meta(name)), NAMES[name]
    if expected in ("ViT", "DistilledViT", "Swin"):
        assert found == expected
    else:
        assert re.search(expected, found), found
        assert found.startswith(name) or "of ours already" in found


@pytest.mark.need("B7")
@pytest.mark.slow
def test_every_name():
    counted = Counter()
    for name in timm.list_models():
        theirs = on_meta(name)
        found = outcome(name, theirs)
        known = type(theirs).__name__ in (*FAMILIES, *SWINS)
        kind = found if found in ("ViT", "DistilledViT", "Swin") else "a part is refused" if known else "not covered"
        counted[kind] += 1
    assert counted["ViT"] + counted["DistilledViT"] >= 263  # of timm 1.0.31
    assert counted["Swin"] >= 21
    assert counted["a part is refused"] <= 44, counted


@pytest.mark.need("B7")
def test_a_name_that_timm_has_not():
    with pytest.raises(ConfigError, match="unknown timm model 'vit_tiny_patch16_225'; did you mean 'vit_tiny_patch16_"):
        from_timm("vit_tiny_patch16_225")
    with pytest.raises(ConfigError, match="unknown pretrained tag of test_vit 'r160'; did you mean 'r160_in1k'"):
        from_timm("test_vit.r160")
    with pytest.raises(ConfigError, match="a name of timm's or a timm model, got int"):
        from_timm(3)


@pytest.mark.need("B7")
def test_a_wrapper_for_features_names_what_is_in_it():
    theirs = timm.create_model("test_vit", features_only=True)
    with pytest.raises(ConfigError, match=r"FeatureGetterNet is not covered; the model in it \(\.model\)"):
        from_timm(theirs)
    assert from_timm(theirs.model).num_classes == 0
