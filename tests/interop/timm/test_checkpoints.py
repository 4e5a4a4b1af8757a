"""Files and sizes: original names, another patch, policies, timm's own loader, and native models written for timm."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.patch_embed import resample_patch_embed
from timm.models import Eva, VisionTransformer

from tests.helpers import redrawn
from tests.interop.timm.test_from_timm import create, images, same
from vit2dpe import CheckpointError, ConfigError, ViT, from_timm, set_policy, to_timm, use_policy
from vit2dpe.interop.timm.read import read
from vit2dpe.models import DistilledViT

MICRO = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)


def drawn(model):
    return redrawn(model, 0.2, lambda name: name.endswith(("norm1.weight", "norm2.weight", "gamma")), seed=3)


# sizes -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_evas_rotary_at_a_new_size_by_policy():
    """By itself EVA interpolates from the corner; another policy is the model's until it is set again."""
    theirs = create("eva02_tiny_patch14_224", dynamic_img_size=True)
    ours, x = from_timm(theirs), images(theirs, 20, 18)
    own = ours(x)
    same(own, theirs(x))
    chosen = from_timm(theirs, policy="interpolate")
    assert not torch.allclose(chosen(x), own, rtol=0, atol=1e-4)
    with use_policy(chosen, "default", temperature="log"):
        assert chosen.position.terms[1].policy.align == "half_pixel"
    set_policy(chosen, "interpolate(align=corner)")
    assert torch.equal(chosen(x), own)
    assert chosen.position.terms[1].policy.train == (16, 16)
    with pytest.raises(ConfigError, match="LearnedTable cannot extrapolate"):
        from_timm(create("vit_tiny_patch16_224"), policy="extrapolate")
    with pytest.raises(ConfigError, match="a policy is one name or several"):
        set_policy(chosen, "default")
    with pytest.raises(ConfigError, match="no train_grid"):
        set_policy(torch.nn.Linear(2, 2), "interpolate")


@torch.no_grad()
def test_a_policy_measures_from_the_size_of_the_weights():
    """Made 20x18 its own, the model still interpolates from 16x16, as one that only runs there does."""
    theirs = create("eva02_tiny_patch14_224")
    x = images(theirs, 20, 18)
    for policy in ("interpolate", "extrapolate", "ntk"):
        run, made = (from_timm(theirs, policy=policy, img_size=size) for size in (None, (280, 252)))
        assert made.train_grid == (20, 18)
        same(made(x), run(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "vit_relpos_small_patch16_224"])
@torch.no_grad()
def test_another_patch_is_timms(name):
    theirs = create(name)
    ours = from_timm(theirs, patch_size=(12, 8), img_size=(48, 64))
    assert ours.patch_embed.patch_size == (12, 8)
    theirs.set_input_size(img_size=(48, 64), patch_size=(12, 8))
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    kernel = theirs.patch_embed.proj.weight
    assert torch.equal(ours.patch_embed.proj.weight, kernel)
    kernel = create(name).patch_embed.proj.weight
    assert torch.equal(from_timm(create(name), "none", patch_size=32).patch_embed.proj.weight,
                       resample_patch_embed(kernel, [32, 32]))  # fmt: skip


TABLED = [
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "eva02_base_patch14_224",
    "vit_relpos_base_patch16_clsgap_224",
]


@pytest.mark.parametrize("name", TABLED)
@pytest.mark.parametrize(("old", "new"), [((7, 14), (14, 28)), ((8, 18), (12, 12)), ((16, 16), (10, 20))])
@torch.no_grad()
def test_tables_between_sizes(name, old, new):
    """Made its own at loading, by `set_input_size`, or met at run time: one result; to the same size: the same bits."""
    patch = 14 if "14" in name else 16
    theirs = create(name, img_size=tuple(patch * n for n in old), depth=1)
    size = tuple(patch * n for n in new)
    run, made, still = (from_timm(theirs, img_size=s) for s in (None, size, tuple(theirs.patch_embed.img_size)))
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(made(x), run(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(still.parameters(), run.parameters(), strict=True))
    run.set_input_size(size)
    assert all(torch.equal(a, b) for a, b in zip(run.parameters(), made.parameters(), strict=True))


def test_a_grid_that_cannot_be_known_is_refused():
    """A flat table of 72 rows is 8x9 or 6x12 or 4x18: never the square root's guess."""
    model = ViT("learned", img_size=(64, 160), patch_size=16, **MICRO)
    state = model.state_dict()
    del state["position.pos_embed"]
    state["pos_embed"] = torch.zeros(1, 1 + 72, 48)
    with pytest.raises(CheckpointError, match="pos_embed has 73 rows, the model needs 4x10 = 40"):
        model.load_state_dict(state)


# files -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_original_mae_files():
    """`{"model": ...}` of the encoder alone, or of encoder and decoder; a head is not there and not invented."""
    theirs = create("vit_base_patch16_224", num_classes=0)
    state = theirs.state_dict()
    whole = state | {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 197, 32),
                     "decoder_blocks.0.norm1.weight": torch.ones(32)}  # fmt: skip
    x = images(theirs)
    for file in ({"model": state}, {"model": whole}):
        ours = from_timm("vit_base_patch16_224", weights=file, **{**MICRO, "num_classes": 0}).eval()
        same(ours(x), theirs(x))
    with pytest.raises(CheckpointError, match=r"missing head.bias, head.weight, .*num_classes=0"):
        from_timm("vit_base_patch16_224", weights={"model": state}, **MICRO)
    with pytest.raises(CheckpointError, match="unexpected colour"):
        from_timm("vit_base_patch16_224", weights=state | {"colour": x}, **{**MICRO, "num_classes": 0})


@pytest.mark.parametrize("kind", ["rope", "rope_ape", "rope_mixed", "rope_mixed_ape"])
@torch.no_grad()
def test_rope_vits_own_files(kind):
    """Its names: `freqs` (2, depth, H Dh/2) beside buffers of places, no flat rows for the class token."""
    theirs = create(f"vit_small_patch16_{kind}_224")
    state = dict(theirs.state_dict())
    if "mixed" in kind:
        state["freqs"] = state.pop("rope.freqs").flatten(2)
        state |= {"freqs_t_x": torch.arange(196) % 14, "freqs_t_y": torch.arange(196) // 14}
    ours = from_timm(f"vit_small_patch16_{kind}_224", weights={"model": state}, **MICRO).eval()
    x = images(theirs, 9, 5)
    theirs.set_input_size(tuple(x.shape[-2:]))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["timm", "rope-vit"])
@torch.no_grad()
def test_frequencies_of_all_blocks_are_taken_by_a_model_of_ours(kind):
    """`rope.freqs` of timm and `freqs` of rope-vit, columns first, without `from_timm`."""
    theirs = create("vit_small_patch16_rope_mixed_224")
    state = dict(theirs.state_dict())
    ours = from_timm(theirs)
    bare = ViT("rope_mixed", **read(theirs).arguments).eval()
    foreign = {name: value for name, value in ours.state_dict().items() if not name.endswith(".freqs")}
    freqs = state["rope.freqs"]
    if kind == "timm":
        foreign["rope.freqs"] = freqs
    else:
        foreign |= {"freqs": freqs.flatten(2), "freqs_t_x": torch.zeros(196), "freqs_t_y": torch.zeros(196)}
    bare.load_state_dict(foreign)
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(bare(x), ours(x))
    name = "rope.freqs" if kind == "timm" else "freqs"
    with pytest.raises(CheckpointError, match=rf"^{name} is .* blocks with rope_mixed"):
        bare.load_state_dict(foreign | {name: foreign[name][:, :1]})


@torch.no_grad()
def test_original_dinov3_names_and_a_file(tmp_path):
    """timm's own translation of original files is used, so what it reads is read; from a file without running it."""
    theirs = create("vit_small_patch16_dinov3", num_classes=0)
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens"}
    state = {"mask_token": torch.zeros(1, 48)}
    for name, value in theirs.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        state[name] = value
    save_file(state, tmp_path / "dinov3.safetensors")
    x = images(theirs)
    for weights in (state, tmp_path / "dinov3.safetensors"):
        ours = from_timm("vit_small_patch16_dinov3", weights=weights, **{**MICRO, "num_classes": 0}).eval()
        same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_pretrained_is_timms_own_loader(name, tmp_path):
    """`pretrained=True` with a local file in the place of a download, at another size and class count too."""
    theirs = create(name)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"), num_classes=5)
    ours = from_timm(name, pretrained=True, pretrained_cfg_overlay=overlay, **MICRO).eval()
    x = images(theirs)
    same(ours(x), theirs(x))
    size = tuple(4 * n for n in theirs.patch_embed.patch_size)
    fresh = from_timm(
        name, pretrained=True, img_size=size, pretrained_cfg_overlay=overlay, **{**MICRO, "num_classes": 3}
    ).eval()
    theirs.set_input_size(size)
    x = images(theirs)
    same(fresh.forward_features(x), theirs.forward_features(x))
    assert fresh.head.out_features == 3


def test_what_goes_with_a_name_alone():
    theirs = create("vit_tiny_patch16_224")
    for given in (dict(pretrained=True), dict(weights={}), dict(depth=3)):
        with pytest.raises(ConfigError, match=f"{next(iter(given))} goes with a name"):
            from_timm(theirs, **given)


def test_rates_of_training_are_kept():
    rates = dict(drop_path_rate=0.3, drop_rate=0.1, pos_drop_rate=0.2, patch_drop_rate=0.25, attn_drop_rate=0.15)
    ours = from_timm("vit_small_patch16_rope_ape_224", **rates, **MICRO)
    assert [ours.head_drop.p, ours.pos_drop.p, ours.patch_drop.rate] == [0.1, 0.2, 0.25]
    assert ours.blocks[1].drop_path2.drop_prob == pytest.approx(0.3)
    assert ours.blocks[0].attn.attn_drop == 0.15


# to timm -----------------------------------------------------------------------------------------------------------

EVA = dict(
    global_pool="token", attn_type="rope", init_values=0.1, use_rot_pos_emb=True, rope_temperature=100.0, **MICRO
)
NATIVE = {
    "none": (VisionTransformer, dict(pos_embed="none", init_values=0.1, **MICRO)),
    "learned": (VisionTransformer, dict(init_values=0.1, **MICRO)),
    "rope": (Eva, dict(use_abs_pos_emb=False, **EVA)),
    "learned+rope": (Eva, EVA),
    "rope_mixed": (Eva, dict(use_abs_pos_emb=False, **EVA, rope_type="mixed", rope_grid_indexing="xy")),
    "learned+rope_mixed": (Eva, EVA | dict(rope_type="mixed", rope_grid_indexing="xy")),
    "rope_dinov3": (Eva, dict(use_abs_pos_emb=False, **EVA, rope_type="dinov3", rope_rotate_half=True)),
    "sincos": (VisionTransformer, dict(init_values=0.1, **MICRO)),
    "fourier+learned+windowed+factorized": (VisionTransformer, dict(init_values=0.1, **MICRO)),
    "sincos+rope": (Eva, EVA),
}
RELPOS = {
    "relative": dict(rel_pos_type="bias"),
    "relative(prefix=true)": dict(rel_pos_type="bias"),
    "relative(shared=true)": dict(rel_pos_type="bias", shared_rel_pos=True),
    "logcpb": dict(rel_pos_type="mlp-swin", rel_pos_dim=512),
    "logcpb(hidden=32, shared=true)": dict(rel_pos_type="mlp-swin", rel_pos_dim=32, shared_rel_pos=True),
    "logcpb(form=cr, hidden=32)": dict(rel_pos_type="mlp", rel_pos_dim=32),
}


@pytest.mark.parametrize("position", NATIVE)
@torch.no_grad()
def test_a_native_model_written_for_timm(position):
    ours = drawn(ViT(position, img_size=(48, 80), patch_size=16, init_values=0.1, reg_tokens=2, **MICRO))
    kind, arguments = NATIVE[position]
    registers = dict(reg_tokens=2) if kind is VisionTransformer else dict(num_reg_tokens=2)
    eps = (
        {} if kind is VisionTransformer else dict(norm_layer=lambda dim, **kw: torch.nn.LayerNorm(dim, eps=1e-6, **kw))
    )
    theirs = kind(img_size=(48, 80), **arguments, **registers, **eps).eval()
    theirs.load_state_dict(to_timm(ours))
    x = torch.randn(2, 3, 48, 80)
    same(theirs(x), ours(x))
    theirs.pretrained_cfg = {}
    same(from_timm(theirs)(x), ours(x))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("position", RELPOS)
@torch.no_grad()
def test_a_relative_bias_written_for_timm(position, class_token):
    pool = dict(class_token=class_token, global_pool="token" if class_token else "avg", fc_norm=False, init_values=0.1)
    ours = drawn(ViT(position, img_size=(48, 80), patch_size=16, **MICRO, **pool))
    theirs = timm.models.VisionTransformerRelPos(img_size=(48, 80), **MICRO, **pool, **RELPOS[position]).eval()
    theirs.load_state_dict(to_timm(ours))
    x = torch.randn(2, 3, 48, 80)
    same(theirs(x), ours(x))


@pytest.mark.parametrize(
    ("position", "more", "reason"),
    [
        ("relative+sincos", {}, "no a table of vectors beside it"),
        ("relative", dict(reg_tokens=1), "no registers"),
        ("relative", dict(reg_tokens=1, class_token=False, global_pool="avg"), "no registers"),
        ("relative", dict(global_pool="map"), "no attention pooling"),
        ("relative", dict(pre_norm=True), "no a norm before the blocks"),
        ("relative", dict(scale_mlp_norm=True), "no norms inside"),
        ("logcpb", dict(qkv_bias="qv", mlp_layer="swiglu"), "no an MLP of another kind and no biases of q and v alone"),
    ],
)
def test_what_timms_relative_vit_has_not(position, more, reason):
    with pytest.raises(ConfigError, match=reason):
        to_timm(ViT(position, img_size=(48, 80), patch_size=16, **MICRO, **more))


def test_a_network_trained_on_another_grid_has_no_timm_model():
    ours = ViT("logcpb", img_size=(48, 80), patch_size=16, **MICRO)
    ours.set_input_size((64, 64))
    with pytest.raises(ConfigError, match="trained on another grid"):
        to_timm(ours)


@torch.no_grad()
def test_a_network_that_knows_no_grid_goes_at_any_size():
    ours = drawn(ViT("logcpb(form=cr, hidden=32)", img_size=(48, 80), patch_size=16, init_values=0.1, **MICRO))
    ours.set_input_size((64, 64))
    more = dict(class_token=True, global_pool="token", fc_norm=False, init_values=0.1)
    theirs = timm.models.VisionTransformerRelPos(img_size=64, rel_pos_type="mlp", rel_pos_dim=32, **MICRO, **more)
    theirs.eval().load_state_dict(to_timm(ours))
    x = torch.randn(2, 3, 64, 64)
    same(theirs(x), ours(x))


def test_what_a_formula_adds_is_written_in_the_weights_precision():
    ours = ViT("sincos", img_size=(48, 80), patch_size=16, **MICRO).bfloat16()
    assert {value.dtype for value in to_timm(ours).values()} == {torch.bfloat16}


def test_a_parameter_that_ours_has_not_is_named():
    theirs = create("vit_tiny_patch16_224")
    theirs.colour = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError, match="without a counterpart: colour"):
        from_timm(theirs, "rope")
    with pytest.raises(CheckpointError, match="without a counterpart: colour"):
        from_timm(theirs)


@torch.no_grad()
def test_steps_that_build_on_each_other_go_back_in_the_other_order():
    """Maps of q, k and v of their own, in half-split pairs: joined and reordered, reordered back and parted."""
    made = EVA | dict(attn_type="eva", qkv_fused=False, rope_rotate_half=True)
    theirs = drawn(Eva(img_size=(48, 80), **made))
    theirs.pretrained_cfg = {}
    ours, x = from_timm(theirs), torch.randn(2, 3, 48, 80)
    same(ours(x), theirs(x))
    again = Eva(img_size=(48, 80), **made).eval()
    again.load_state_dict(to_timm(ours))
    same(again(x), ours(x))


@torch.no_grad()
def test_a_distilled_one_too():
    ours = drawn(DistilledViT(img_size=(48, 80), patch_size=16, **MICRO))
    theirs = timm.models.VisionTransformerDistilled(img_size=(48, 80), **MICRO).eval()
    theirs.load_state_dict(to_timm(ours))
    x = torch.randn(2, 3, 48, 80)
    same(theirs(x), ours(x))
    ours.train().set_distilled_training()
    first, second = ours(x)
    same((first + second) / 2, theirs(x))
    assert {"cls_token", "dist_token", "position.pos_embed"} <= ours.no_weight_decay()
    ours.reset_classifier(7)
    assert [head.out_features for head in ours.get_classifier()] == [7, 7]
    assert ours(x)[1].shape == (2, 7)
    with pytest.raises(ConfigError, match="global_pool='avg'"):
        ours.reset_classifier(7, "avg")
    with pytest.raises(ConfigError, match="no registers"):
        DistilledViT(reg_tokens=1, **MICRO)


@pytest.mark.parametrize(
    "position", ["alibi", "rope+alibi", "relative+rope", "rope(step=0.5)", "rope(start=1)", "rope_mixed+fire"]
)
def test_what_timm_has_no_model_for(position):
    with pytest.raises(ConfigError, match=r"timm has no ViT with .*state_dict"):
        to_timm(ViT(position, img_size=(48, 80), patch_size=16, **MICRO))
    with pytest.raises(ConfigError, match="a ViT or a Swin of ours, got Linear"):
        to_timm(torch.nn.Linear(2, 2))


def test_exchanged_encodings_go_back_as_native_ones():
    theirs = create("vit_tiny_patch16_224")
    state = to_timm(from_timm(theirs, "rope_mixed"))
    assert state["rope.freqs"].shape == (2, 2, 3, 8)
    assert "pos_embed" not in state
    with pytest.raises(ConfigError, match="timm has no ViT with Alibi"):
        to_timm(from_timm(theirs, "alibi"))
