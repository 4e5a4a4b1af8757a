"""timm's models become ours with the same logits, run at rectangles, take other encodings, and go back."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import resolve_data_config

from tests.helpers import randn
from tests.interop.timm.trajectory import assert_fifty_equal_steps
from vit2dpe import ConfigError, from_timm, to_timm
from vit2dpe.encodings.registry import parse
from vit2dpe.interop.timm.read import FAMILIES, read

SMALL = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
BLOCKY = dict(img_size=224)  # where the size of its own would be 1,024 tokens and more
# Architecture names, made small, and what is changed beside that. The parts are what differs between them.
NAMES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_224": {},
    "vit_base_patch8_224": dict(img_size=(40, 72)),
    "vit_small_patch16_36x1_224": {},
    "vit_medium_patch16_gap_240": {},
    "vit_medium_patch16_reg4_gap_256": {},
    "vit_wee_patch16_reg1_gap_256": {},
    "vit_base_patch16_rpn_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch32_siglip_256": {},
    "vit_base_patch32_clip_224": {},
    "vit_base_patch32_clip_quickgelu_224": {},
    "vit_small_patch14_dinov2": BLOCKY,
    "vit_small_patch14_reg4_dinov2": BLOCKY,
    "vit_giant_patch14_dinov2": BLOCKY,
    "vit_base_patch16_radio_v3": BLOCKY,
    "aimv2_large_patch14_224": {},
    "flexivit_small": {},
    "test_vit3": {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "eva_large_patch14_196": {},
    "eva_giant_patch14_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "eva02_base_patch14_448": BLOCKY,
    "eva02_base_patch16_clip_224": {},
    "eva02_enormous_patch14_clip_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_mediumd_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "vit_base_patch16_lingbot": {},
    "vit_pe_core_base_patch16_224": dict(embed_dim=96),
    "vit_pe_spatial_tiny_patch16_512": dict(img_size=224),
    "beit_base_patch16_224": {},
    "beit3_base_patch16_224": {},
    "beitv2_base_patch16_224": dict(img_size=(48, 80), use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "beit_base_patch16_384": dict(img_size=(48, 80), use_abs_pos_emb=True),
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_medium_patch16_cls_224": {},
    "vit_relpos_base_patch16_clsgap_224": dict(rel_pos_type="bias", img_size=(48, 80)),
    "vit_relpos_small_patch16_rpn_224": dict(rel_pos_type="mlp_swin", img_size=(48, 80)),
    "vit_srelpos_small_patch16_224": {},
    "vit_srelpos_medium_patch16_224": dict(rel_pos_type="bias", img_size=(48, 80)),
}


def create(name, **kwargs):
    """Small, and every parameter away from its start: what is zero or one there would hide mistakes."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **NAMES.get(name, {}), **kwargs})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            gain = key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "gamma_1", "gamma_2"))
            table = key.endswith(("table", "pos_embed", "fc2.weight")) and "mlp" not in key.replace("rel_pos.mlp", "")
            parameter.copy_(torch.randn_like(parameter) * (1.0 if table else 0.2) + gain)
    return model.eval()


def images(model, rows=None, columns=None, batch=2):
    patch, size = model.patch_embed.patch_size, model.patch_embed.img_size
    height, width = size if rows is None else (rows * patch[0], columns * patch[1])
    return randn(batch, 3, height, width, seed=1)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_are_timms_and_the_way_back_too(name):
    theirs = create(name)
    ours = from_timm(theirs)
    x = images(theirs)
    logits = ours(x)
    same(logits, theirs(x))
    same(ours.forward_features(x), theirs.forward_features(x))
    assert not ours.training

    state, before = to_timm(ours), theirs.state_dict()
    assert list(state.keys() ^ before.keys()) == []
    folded = {"cls_token", "reg_token", "dist_token", "pos_embed"}  # rows of tokens are now in the tokens
    assert [name for name in before.keys() - folded if not torch.equal(state[name], before[name])] == []
    again = create(name)
    again.load_state_dict(state)
    same(again(x), logits)


@pytest.mark.parametrize("position", [None, "rope"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_base_patch16_siglip_224", SMALL),
        ("eva02_tiny_patch14_224", SMALL),
        ("swinv2_tiny_window8_256", dict(embed_dim=24, depths=(1, 1), num_heads=(2, 4), num_classes=5)),
    ],
)
def test_mode_precision_and_record_come_along(name, sizes, position):
    """timm's tools read sizes, mean and standard deviation from the record."""
    theirs = timm.create_model(name, **sizes).bfloat16().train()
    ours = from_timm(theirs, position)
    assert ours.training
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert ours.pretrained_cfg is ours.default_cfg
    differing = {"architecture", "fixed_input_size", "url", "hf_hub_id", "custom_load"}  # a name of ours, at any size
    for key in (ours.pretrained_cfg.keys() | theirs.pretrained_cfg) - differing:
        assert ours.pretrained_cfg[key] == theirs.pretrained_cfg[key]
    found = resolve_data_config({}, model=ours)
    assert found == resolve_data_config({}, model=theirs)
    assert found["mean"] == theirs.pretrained_cfg["mean"]
    assert not from_timm(theirs.eval(), position).training


ROTARY = [name for name in NAMES if type(create(name, depth=1)).__name__ == "Eva"]
ANY_SIZE = [
    *ROTARY,
    "vit_tiny_patch16_224",
    "vit_base_patch32_clip_224",
    "deit_tiny_distilled_patch16_224",
    "test_vit3",
]


@pytest.mark.parametrize("name", ANY_SIZE)
@torch.no_grad()
def test_a_rectangle_is_timms(name):
    """At sizes of run time, where timm takes those: tables resized, EVA's places interpolated, the others' not."""
    theirs = create(name, dynamic_img_size=True)
    ours = from_timm(theirs)
    for grid in ((4, 7), (19, 5)):
        x = images(theirs, *grid)
        same(ours(x), theirs(x))


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "beitv2_base_patch16_224", "vit_relpos_small_patch16_224",
             "vit_srelpos_medium_patch16_224", "vit_pe_core_base_patch16_224", "eva02_base_patch14_224"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning")
@torch.no_grad()
def test_another_size_made_its_own_is_timms(name):
    """timm's `set_input_size` is ours, and `img_size=`."""
    theirs = create(name)
    ours, built = from_timm(theirs), from_timm(theirs, img_size=(64, 112) if "14" not in name else (56, 98))
    x = images(theirs, 4, 7)
    theirs.set_input_size(tuple(x.shape[-2:]))
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(built(x), expected, rtol=1e-4, atol=1e-4)
    assert built.train_grid == (4, 7)
    ours.set_input_size(tuple(x.shape[-2:]))
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i % 2 else []) for i, name in enumerate(NAMES)]
)
@torch.no_grad()
def test_its_weights_with_another_encoding(name):
    theirs = create(name, img_size=(3 * 28, 5 * 28) if "14" in name else (3 * 32, 5 * 32))
    own = from_timm(theirs)
    x = images(theirs, batch=1)
    expected = own(x)
    for position in ("rope", "alibi", "none"):
        ours = from_timm(theirs, position)
        logits = ours(x)
        assert logits.isfinite().all()
        if position not in {term for term, _ in parse(read(theirs).position)}:  # its own keeps weights and options
            assert not torch.allclose(logits, expected, rtol=0, atol=1e-3)
        kept = {name: value for name, value in own.state_dict().items() if "position." not in name}
        assert all(torch.equal(value, ours.state_dict()[name]) for name, value in kept.items())
        assert ours.state_dict().keys() == kept.keys()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_tiny", "ConvNeXt is not covered; covered are timm's VisionTransformer, .*Eva"),
        ("vit_dwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256: .*attention of another kind .DiffAttention"),
        ("vit_base_patch16_18x2_224", "blocks of another kind .ParallelThingsBlock"),
        ("vit_base_patch16_xp_224", "blocks of another kind .ParallelScalingBlock"),
        ("vit_small_r26_s32_224", "a patch embedding that is not one convolution"),
        ("vit_base_patch16_sapiens2", "q, k and v in maps of their own; LayerScale on attention alone"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(name, reason):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    with pytest.raises(ConfigError, match=reason):
        from_timm(theirs)
    assert type(theirs).__name__ in reason or type(theirs).__name__ in FAMILIES


@pytest.mark.parametrize(
    "name",
    [
        "vit_medium_patch16_gap_240",
        "vit_medium_patch16_rope_reg1_gap_256",
        pytest.param("vit_small_patch16_dinov3", marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_of_adamw_are_timms(name):
    # Without a table that has a row for the class token: timm moves that row and the token, two parameters, by Adam's
    # step each, where ours moves one.
    theirs = create(name, img_size=(32, 48), global_pool="avg").train()
    ours = from_timm(theirs)
    x = images(theirs, 2, 3, batch=4)
    assert_fifty_equal_steps(theirs, ours, lambda step: x)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("swin_tiny_patch4_window7_224", dict(img_size=(56, 112), window_size=7)),
        ("swinv2_tiny_window8_256", dict(img_size=(64, 128), window_size=8)),
    ],
)
@torch.no_grad()
def test_swin_comes_the_same_way_and_goes_back(name, sizes):
    torch.manual_seed(0)
    theirs = timm.create_model(name, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5, **sizes).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ours, x = from_timm(theirs), torch.randn(2, 3, *sizes["img_size"])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    back = to_timm(ours)
    assert all(torch.equal(back[name], value) for name, value in theirs.named_parameters())
    assert from_timm(theirs, "rope_mixed")(x).isfinite().all()
    assert not torch.allclose(from_timm(theirs, "none")(x), theirs(x), atol=1e-3)
