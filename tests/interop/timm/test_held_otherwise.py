"""timm's models as people hold them: built by their class, with every option, wrapped, of any image size."""

import copy

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.helpers import randn, shaken
from vit2dpe import CheckpointError, ConfigError, from_timm, to_timm
from vit2dpe.models.timm_api import pretrained_cfg_of

MICRO = dict(img_size=(32, 48), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
STAGES = dict(img_size=(32, 48), patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4)


def made(cls, **more):
    torch.manual_seed(0)
    sizes = STAGES if "Swin" in cls.__name__ else MICRO
    return shaken(cls(**sizes | more), 0.1)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


CLASSES = {
    "ViT": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "Eva": (Eva, dict(use_rot_pos_emb=True)),
    "Beit": (Beit, dict(use_rel_pos_bias=True)),
    "RelPos": (VisionTransformerRelPos, {}),
    "Swin": (SwinTransformer, {}),
    "SwinV2": (SwinTransformerV2, {}),
}


@pytest.mark.need("B5")
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_built_by_its_class(kind):
    """Such a model has no `pretrained_cfg`; ours has sizes, and no numbers that would be timm's."""
    cls, more = CLASSES[kind]
    theirs = made(cls, **more)
    assert not hasattr(theirs, "pretrained_cfg")
    ours, x = from_timm(theirs), randn(2, 3, 32, 48)
    same(ours(x), theirs(x))
    assert not {"mean", "std", "tag", "license"} & pretrained_cfg_of(ours).keys()
    assert resolve_data_config({}, model=ours)["input_size"]
    again = copy.deepcopy(theirs)
    again.load_state_dict(to_timm(ours))
    same(again(x), theirs(x))


OPTIONS = {
    "no head": dict(num_classes=0),
    "one channel": dict(in_chans=1),
    "no class token": dict(class_token=False, global_pool="avg"),
    "registers": dict(reg_tokens=3),
    "registers without rows": dict(reg_tokens=3, no_embed_class=True),
    "no table": dict(pos_embed="none"),
    "all tokens": dict(global_pool=""),
    "attention pooling": dict(global_pool="map"),
    "average": dict(global_pool="avg"),
    "maximum": dict(global_pool="max"),
    "average and maximum": dict(global_pool="avgmax", fc_norm=False),
    "maximum of everything": dict(global_pool="max", pool_include_prefix=True, reg_tokens=1),
    "average of everything": dict(global_pool="avg", pool_include_prefix=True, reg_tokens=1),
    "average, norm before": dict(global_pool="avg", fc_norm=False),
    "class token, norm behind": dict(fc_norm=True),
    "no norm": dict(final_norm=False),
    "no norm, average": dict(final_norm=False, global_pool="avg"),
    "norms elsewhere": dict(pre_norm=True, embed_norm_layer="layernorm"),
    "norms inside": dict(scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True),
    "rms": dict(norm_layer="rmsnorm"),
    "scaled branches": dict(init_values=1e-3),
    "biases": dict(qkv_bias=False, proj_bias=False),
    "relu": dict(act_layer="relu", mlp_ratio=2.7),
}


@pytest.mark.need("B5a")
@pytest.mark.parametrize("option", OPTIONS)
@torch.no_grad()
def test_every_option_of_the_class(option):
    theirs = made(VisionTransformer, **OPTIONS[option])
    ours, x = from_timm(theirs), randn(2, theirs.in_chans, 32, 48)
    same(ours(x), theirs(x))
    same(ours.forward_features(x), theirs.forward_features(x))


@pytest.mark.need("B5a")
def test_rates_of_training_come_along():
    rates = dict(drop_rate=0.1, pos_drop_rate=0.2, patch_drop_rate=0.3, proj_drop_rate=0.4, attn_drop_rate=0.5)
    theirs = made(VisionTransformer, **rates, drop_path_rate=0.6).train()
    ours = from_timm(theirs)
    assert ours.training
    drops = {
        "head_drop": 0.1,
        "pos_drop": 0.2,
        "blocks.0.attn.proj_drop": 0.4,
        "blocks.0.mlp.drop1": 0.4,
    }
    assert {name: ours.get_submodule(name).p for name in drops} == drops
    assert (ours.patch_drop.rate, ours.blocks[1].attn.attn_drop) == (0.3, 0.5)
    assert ours.blocks[1].drop_path1.drop_prob == pytest.approx(0.6)


@pytest.mark.need("B5c")
@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
def test_rates_of_a_swin_come_along(cls):
    theirs = made(cls, drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.6)
    ours = from_timm(theirs)
    rates = {name: part.p for name, part in theirs.named_modules() if isinstance(part, nn.Dropout) and part.p}
    found = {name: part.p for name, part in ours.named_modules() if isinstance(part, nn.Dropout) and part.p}
    assert found == {name: rate for name, rate in rates.items() if not name.endswith("attn_drop")}
    assert {block.attn.attn_drop for stage in ours.layers for block in stage.blocks} == {0.3}
    for stage, own in zip(theirs.layers, ours.layers, strict=True):
        for block, other in zip(stage.blocks, own.blocks, strict=True):
            rate = getattr(block.drop_path1, "drop_prob", 0.0)
            assert getattr(other.drop_path1, "drop_prob", 0.0) == pytest.approx(rate)
    assert rates["head.drop"] == 0.1


def test_registers_of_a_distilled_model_are_refused():
    with pytest.raises(ConfigError, match="VisionTransformerDistilled: registers beside a distillation token"):
        from_timm(made(VisionTransformerDistilled, reg_tokens=2))


@pytest.mark.need("B7")
@torch.no_grad()
def test_a_size_that_the_patch_does_not_divide_is_the_size_it_is_cut_to():
    theirs, x = made(VisionTransformer, img_size=(38, 52)), randn(2, 3, 38, 52)
    with pytest.raises(ConfigError, match=r"no multiple of its patch 8x8.*img_size=\(32, 48\) makes it the same"):
        from_timm(theirs)
    same(from_timm(theirs, img_size=(32, 48))(x[..., :32, :48]), theirs(x))


@pytest.mark.need("B5d")
@pytest.mark.parametrize("position", [None, "rope_mixed"])
@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_frozen_stays_frozen(kind, position):
    """All but the head and one block; an encoding that is drawn anew learns."""
    cls, more = CLASSES[kind]
    theirs = made(cls, **more)
    block = "layers.1.blocks.1." if kind.startswith("Swin") else "blocks.1."
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", block)))
    theirs.set_grad_checkpointing()
    ours = from_timm(theirs, position)
    assert all(p.requires_grad for p in from_timm(made(cls, **more), position).parameters())
    for name, parameter in ours.named_parameters():
        drawn = position is not None and "position." in name
        assert parameter.requires_grad == (drawn or name.startswith(("head.", block))), name
    checked = ours.layers[0] if kind.startswith("Swin") else ours
    assert checked.grad_checkpointing


def test_parameters_of_other_names_are_named():
    theirs = made(VisionTransformer)
    nn.utils.parametrizations.weight_norm(theirs.blocks[0].attn.qkv)
    with pytest.raises(
        CheckpointError, match=r"without a counterpart: blocks.0.attn.qkv.weight, blocks.0.attn.qkv.par"
    ):
        from_timm(theirs)


PADDED = {
    "ViT": (VisionTransformer, {}),
    "registers": (VisionTransformer, dict(reg_tokens=2, no_embed_class=True)),
    "rotation": (Eva, dict(use_rot_pos_emb=True, use_abs_pos_emb=False)),
    "rotation of a grid": (Eva, dict(use_rot_pos_emb=True, ref_feat_shape=(4, 4))),
}


@pytest.mark.need("B6")
@pytest.mark.parametrize("kind", PADDED)
@torch.no_grad()
def test_padded_to_the_patch(kind):
    cls, more = PADDED[kind]
    theirs = made(cls, dynamic_img_size=True, dynamic_img_pad=True, **more)
    ours = from_timm(theirs)
    for size in ((32, 48), (31, 45), (17, 61), (5, 3)):
        x = randn(2, 3, *size)
        same(ours(x), theirs(x))
    assert ours.dynamic_img_pad
    assert from_timm(theirs, "alibi").dynamic_img_pad


@pytest.mark.need("B6")
@torch.no_grad()
def test_its_own_size_is_padded_too():
    """timm builds a table for the whole patches of the size, and resizes it to the padded grid at run time."""
    theirs = made(VisionTransformer, img_size=(36, 45), dynamic_img_size=True, dynamic_img_pad=True)
    ours = from_timm(theirs)
    for size in ((36, 45), (40, 48), (33, 41), (64, 64)):
        x = randn(2, 3, *size)
        same(ours(x), theirs(x))


WRAPPERS = {
    "compiled": lambda model: torch.compile(model),
    "in parallel": nn.DataParallel,
    "compiled in parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "an average": AveragedModel,
    "timm's average": ModelEmaV3,
}


@pytest.mark.need("B5b")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@torch.no_grad()
def test_wrapped(wrapper):
    theirs, x = made(VisionTransformer), randn(1, 3, 32, 48)
    same(from_timm(WRAPPERS[wrapper](theirs))(x), theirs(x))


@pytest.mark.need("B5b")
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_half_precision_and_evaluation_come_along(kind):
    cls, more = CLASSES[kind]
    theirs = made(cls, **more).bfloat16()
    ours = from_timm(theirs)
    assert {value.dtype for value in ours.parameters()} == {torch.bfloat16}
    assert not ours.training
    assert from_timm(theirs.train()).training


@pytest.mark.need("B5b")
@pytest.mark.parametrize("position", [None, "rope_mixed"])
def test_on_the_meta_device_it_stays_there(position):
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch16_dinov3", depth=1)
    ours = from_timm(theirs, position, img_size=64, patch_size=8)
    assert {value.device.type for value in ours.parameters()} == {"meta"}
    assert ours.train_grid == (8, 8)
