"""A model that came from timm is saved and comes back, bit for bit: hub folders, run folders, files, timm's scripts."""

import copy
import json
import re
from itertools import product

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config, resolve_input_data_config
from timm.models import _builder, get_model_args, resolve_model_input_args, save_for_hf
from timm.models.vision_transformer import VisionTransformer

import vit2dpe.models
from tests.helpers import randn, shaken
from vit2dpe import from_timm, set_policy, to_timm
from vit2dpe.encodings import AxialRoPE
from vit2dpe.interop.timm import steps
from vit2dpe.interop.timm.record import STEPS
from vit2dpe.models.card import card
from vit2dpe.training.checkpoint import load_run, save_model

pytestmark = pytest.mark.need("B15")
NAME = "vit2dpe_from_timm"
MICRO = dict(depth=2, embed_dim=48, num_heads=3, num_classes=5)
WINDOWS = dict(embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5)
# What differs is the family, its tokens, its pooling, its encoding; sizes are of timm's model.
MODELS = {
    "vit_tiny_patch16_224": MICRO,
    "deit_tiny_distilled_patch16_224": MICRO,
    "vit_base_patch16_siglip_224": MICRO,
    "vit_base_patch32_clip_224": MICRO,
    "vit_small_patch14_reg4_dinov2": MICRO | dict(img_size=112),
    "eva02_tiny_patch14_224": MICRO,
    "vit_small_patch16_rope_224": MICRO,
    "vit_small_patch16_rope_mixed_224": MICRO,
    "vit_small_patch16_dinov3": MICRO | dict(img_size=128),
    "beit_base_patch16_224": MICRO,
    "vit_relpos_small_patch16_224": MICRO,
    "swin_tiny_patch4_window7_224": WINDOWS | dict(img_size=112),
    "swinv2_tiny_window8_256": WINDOWS | dict(img_size=128),
}
ENCODINGS = (None, "none", "alibi", "relative", "learned", "rope")
# In the default run every model and every encoding twice; the others are slow.
CASES = [
    pytest.param(name, position, marks=[] if (j - i) % 6 == 0 or (j == 0 and i % 4 == 1) else [pytest.mark.slow])
    for (i, name), (j, position) in product(enumerate(MODELS), enumerate(ENCODINGS))
]


def sizes_of(name):
    """Another size than timm's, so that it is one of those that have to be kept."""
    return dict(img_size=(84, 56) if "patch14" in name else (64, 96))


def make(name, position=None, **kwargs):
    torch.manual_seed(0)
    return shaken(from_timm(name, position, **{**MODELS[name], **kwargs}))


def images(model):
    return randn(2, 3, *model.patch_embed.img_size, seed=1)


@torch.no_grad()
def same(again, model, x=None):
    x = images(model) if x is None else x
    return not again.training and torch.equal(again(x), model(x))


def hub(model, folder, **kwargs):
    """By timm, as the card of the folder says."""
    save_for_hf(model, folder, safe_serialization=True, **kwargs)
    model.save_card(folder)
    (usage,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    names = {}
    exec(usage.replace("hf-hub:<user>/<name>", f"local-dir:{folder}"), names)
    return names["model"]


def run(model, folder):
    save_model(folder, model)
    return load_run(folder)


@pytest.mark.parametrize(("name", "position"), CASES)
def test_it_comes_back_bit_for_bit(tmp_path, name, position):
    model = make(name, position, **sizes_of(name))
    again = hub(model, tmp_path / "hub")
    assert type(again) is type(model)
    assert same(again, model)
    assert same(run(model, tmp_path / "run"), model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    given = dict(base=name, position=position, **MODELS[name] | sizes_of(name))
    file = str(tmp_path / "weights.safetensors")
    named = timm.create_model(NAME, checkpoint_path=file, **given).eval()
    assert same(named, model)
    overlay = dict(file=file, num_classes=model.num_classes)
    assert same(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **given).eval(), model)
    assert same(hub(named, tmp_path / "again"), model), "made by the name, and saved"


CHANGED = {
    "vit_tiny_patch16_224": (None, "resize"),
    "deit_tiny_distilled_patch16_224": ("rope", "ntk"),
    "vit_base_patch16_siglip_224": ("learned+rope", "yarn(beta_fast=2)"),
    "eva02_tiny_patch14_224": (None, "ntk"),
    "vit_small_patch16_rope_mixed_224": (None, "ntk"),
    "vit_relpos_small_patch16_224": (None, "extrapolate"),
    "swin_tiny_patch4_window7_224": (None, "scale"),
    "swinv2_tiny_window8_256": ("rope_mixed", "scale+ntk"),
}
SLOW = {"deit_tiny_distilled_patch16_224", "vit_small_patch16_rope_mixed_224", "vit_relpos_small_patch16_224"}


def changed(name, position, policy):
    """A model that after it came got another policy, size and classifier; images it was not made for."""
    model = make(name, position)
    set_policy(model, policy)
    model.set_input_size(sizes_of(name)["img_size"])
    model.reset_classifier(3, None if "distilled" in name else "avg")
    wide = (238, 252) if "patch14" in name else (128, 160) if "swin" in name else (288, 320)  # wider than timm's, too
    return shaken(model), randn(2, 3, *wide, seed=2)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CHANGED])
def test_what_was_changed_later_comes_back_too(tmp_path, name):
    model, wide = changed(name, *CHANGED[name])
    for again in (hub(model, tmp_path / "hub"), run(model, tmp_path / "run")):
        assert same(again, model)
        assert same(again, model, wide), "the policy"
        assert again.train_grid == model.train_grid
        assert again.num_classes == 3
    twice = hub(again, tmp_path / "twice")
    assert same(twice, model, wide)
    model.set_input_size(model.patch_embed.img_size[::-1])
    twice.set_input_size(model.patch_embed.img_size)
    assert same(hub(twice, tmp_path / "thrice"), model, wide), "and from there on"


def test_the_windows_that_encodings_were_trained_on_are_forgotten_with_them(tmp_path):
    """Made for windows of 4 with tables of 12; another size makes tables and windows one."""
    sizes = dict(img_size=128, window_size=4, pretrained_window_sizes=(12, 12))
    given = dict(base="swinv2_tiny_window8_256", position="relative", policy="scale", **WINDOWS)
    model = shaken(from_timm(timm.create_model(given["base"], **WINDOWS | sizes), "relative", "scale"))
    assert model.window_sizes == ((4, 4), (4, 4))
    assert same(hub(model, tmp_path / "first"), model)
    model.set_input_size((64, 96))
    assert model.window_sizes == ((2, 3), (2, 3))
    again = hub(model, tmp_path / "then")
    assert same(again, model)
    assert [extent for _, _, extent in again.position_groups()] == [extent for _, _, extent in model.position_groups()]
    named = shaken(timm.create_model(NAME, **given | sizes | dict(window_size=8)))
    assert named.window_sizes == ((4, 4), (4, 4)), "scaled from 256 to 128 when it was made"
    assert same(hub(named, tmp_path / "named"), named)
    named.set_input_size((64, 96))
    assert same(hub(named, tmp_path / "smaller"), named)


def test_several_policies_come_back_each_with_the_grid_it_measures_from(tmp_path):
    model = make("vit_tiny_patch16_224", "sincos+rope", **sizes_of(""))
    for policy, train in (("ntk", None), ("interpolate", (7, 9)), ("extrapolate", None), ("ntk", (5, 6))):
        set_policy(model, policy, train=train)
    again, wide = hub(model, tmp_path), randn(1, 3, 288, 320)
    assert same(again, model, wide)
    kept = [(type(part).__name__, part.own_policy) for part in again.position.terms]
    assert kept == [(type(part).__name__, part.own_policy) for part in model.position.terms]
    assert kept[0][1] != kept[1][1]
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, policy="yarn").eval()
    assert not same(other, model, wide), "asked for at loading"


def test_a_model_that_was_built_by_its_class(tmp_path):
    """Its name is not known, what it is made of is."""
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=4, reg_tokens=2)
    theirs = VisionTransformer(**sizes, norm_layer=torch.nn.LayerNorm, act_layer=torch.nn.ReLU)
    for position in (None, "alibi"):
        model = shaken(from_timm(theirs, position))
        again = hub(model, tmp_path / "hub")
        assert same(again, model)
        assert same(run(again, tmp_path / "run"), model)
        assert tuple(again.pretrained_cfg["input_size"]) == (3, 32, 32)
        head = (tmp_path / "hub" / "README.md").read_text()
        assert "license: other\n" in head
        assert "timm's `VisionTransformer`; not from timm's weights" in head
        assert "Normalisation:** not stated" in head
    with pytest.raises((ValueError, RuntimeError), match="VisionTransformer"):
        timm.create_model(NAME, base="VisionTransformer")


def test_what_was_done_to_timms_model_before(tmp_path):
    theirs = timm.create_model("vit_base_patch16_siglip_224", **MICRO)
    theirs.set_input_size((64, 96))
    theirs.reset_classifier(3, "avg")
    theirs.prune_intermediate_layers([0], prune_head=False)
    model = shaken(from_timm(theirs))
    assert len(model.blocks) == 1
    assert same(hub(model, tmp_path), model)


def test_arguments_of_timms_model_alone(tmp_path):
    """They become arguments of ours, and are not asked of our class when it is built again."""
    given = dict(base="beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, **MICRO)
    model = shaken(timm.create_model(NAME, **given, img_size=64, drop_path_rate=0.1, dynamic_img_size=False))
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert not model.dynamic_img_size
    again = hub(model, tmp_path)
    assert same(again, model)
    assert not again.dynamic_img_size
    assert sorted(get_model_args(again)) == sorted(get_model_args(model))
    with pytest.raises(ValueError, match="unknown argument of ViT 'use_abs_pos_emb'"):
        timm.create_model(f"local-dir:{tmp_path}", use_abs_pos_emb=True)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, drop_path_rate=0.2, img_size=48)
    assert (other.num_classes, other.train_grid, other.blocks[-1].drop_path1.drop_prob) == (3, (3, 3), 0.2)


@torch.no_grad()
def test_a_callers_own_arguments_are_added(tmp_path):
    model = make("vit_tiny_patch16_224", "rope", **sizes_of(""))
    config = dict(model_args=dict(drop_path_rate=0.1))
    save_for_hf(model, tmp_path, model_config=config, model_args=dict(attn_drop_rate=0.2))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.blocks[-1].drop_path1.drop_prob, again.blocks[0].attn.attn_drop) == (0.1, 0.2)
    assert same(again.eval(), model)


def test_timms_record_is_that_of_the_base_under_our_name(tmp_path):
    base = "deit_tiny_distilled_patch16_224"
    theirs = timm.create_model(base, **MICRO)
    model = from_timm(theirs, "rope", img_size=64)
    assert model.default_cfg is model.pretrained_cfg
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}")
    named = timm.create_model(NAME, base=base, position="rope", img_size=64, **MICRO)
    asked = timm.create_model(**resolve_model_input_args(NAME, dict(img_size=64), base=base, position="rope", **MICRO))
    for one in (model, again, named, asked):
        cfg = one.pretrained_cfg
        assert cfg["architecture"] == NAME
        assert all(tuple(cfg[key]) == theirs.pretrained_cfg[key] for key in ("mean", "std"))
        assert [cfg[k] for k in ("interpolation", "crop_pct", "license")] == ["bicubic", 0.9, "apache-2.0"]
        assert tuple(cfg["classifier"]) == ("head", "head_dist")
        assert cfg["first_conv"] == "patch_embed.proj"
        assert not cfg["fixed_input_size"]
        assert not cfg.keys() & {"url", "hf_hub_id"}
        args = get_model_args(one)
        assert (args["base"], args["position"], args["num_classes"]) == (base, "rope", 5)
        assert tuple(args["img_size"]) == ((224, 224) if one is asked else (64, 64))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == NAME
    assert (config["num_classes"], config["pretrained_cfg"]["num_classes"]) == (5, 5)
    assert "file" not in config["pretrained_cfg"]
    assert resolve_data_config({}, model=model) == resolve_data_config({}, model=theirs)
    assert resolve_input_data_config(again, dict(img_size=64))["input_size"] == (3, 64, 64)


def test_the_card_says_what_it_came_from(tmp_path):
    theirs = timm.create_model("vit_small_patch16_dinov3", **MODELS["vit_small_patch16_dinov3"])
    head = from_timm(theirs, "alibi").save_card(tmp_path).read_text()
    assert "license: other\nlicense_name: dinov3-license\nbase_model: timm/vit_small_patch16_dinov3.lvd1689m\n" in head
    assert "# Model card for vit_small_patch16_dinov3\n" in head
    assert "from timm's `vit_small_patch16_dinov3`." in head
    assert "its weights" not in head
    assert card(from_timm(theirs), license="mit")["license"] == "mit"
    assert (
        "patch divides, `interpolate(align=corner)`" in card(make("eva02_tiny_patch14_224"))["details"]["Other sizes"]
    )
    drawn = make("vit_tiny_patch16_224").save_card(tmp_path).read_text()
    assert "license: other\nlibrary" not in drawn
    assert "license: other\n---" in drawn, "of weights that timm does not know"
    assert "timm's `vit_tiny_patch16_224`; not from timm's weights" in drawn


def test_timms_own_weights_by_our_name(monkeypatch):
    """`pretrained=True` without a file of ours: those of the base, by timm's loader; the download is replaced."""
    base = "vit_small_patch16_rope_224"  # whose channels are in another order than ours
    micro = MICRO | dict(num_classes=1000)
    theirs = shaken(timm.create_model(base, **micro))
    asked = []

    def download(repository, **_):
        asked.append(repository)
        return {name: value.clone() for name, value in theirs.state_dict().items()}

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", download)
    given = dict(base=base, pretrained=True, **micro)
    model = timm.create_model(NAME, **given).eval()
    assert same(model, from_timm(theirs))
    other = timm.create_model(NAME, **given | dict(num_classes=3), position="none", img_size=64).eval()
    assert other.num_classes == 3
    assert torch.equal(other.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)
    assert asked == [f"timm/{base}.naver_in1k"] * 2
    assert card(model)["base_model"] == f"timm/{base}.naver_in1k"


def test_the_way_back_to_timm_is_kept(tmp_path):
    for name in ("beit_base_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch32_clip_224"):
        model = make(name)
        before, after = to_timm(model), to_timm(hub(model, tmp_path / name))
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_step_back_can_be_written():
    made = {name for name, kind in vars(steps).items() if hasattr(kind, "back") and kind.__module__ == steps.__name__}
    assert made - {"Evaluated"} == set(STEPS), "Evaluated is of models that did not come from timm"


def test_arguments_of_our_own_class(tmp_path):
    """A run folder of a class that `from_timm` makes, told in its own arguments."""
    arguments = dict(position="rope", img_size=32, patch_size=8, **MICRO)
    model = shaken(vit2dpe.models.DistilledViT(**arguments))
    save_model(tmp_path, model, arguments)
    assert same(load_run(tmp_path), model)


def test_features_alone():
    for name, count in (("vit_tiny_patch16_224", 2), ("swin_tiny_patch4_window7_224", 2)):
        given = MODELS[name] | dict(base=name, position="rope_mixed", img_size=64)
        features = timm.create_model(NAME, features_only=True, **given | dict(out_indices=(0, 1)))
        assert len(features(randn(1, 3, 64, 64))) == count
    assert len(timm.create_model(NAME, features_only=True, **given)(randn(1, 3, 64, 64))) == 2


def test_copies_have_records_of_their_own(tmp_path):
    model = make("eva02_tiny_patch14_224", **sizes_of("patch14"))
    other = copy.deepcopy(model)
    set_policy(other, "ntk")
    other.set_input_size(112)
    assert same(hub(model, tmp_path / "one"), model, randn(1, 3, 238, 252))
    assert same(hub(other, tmp_path / "two"), other, randn(1, 3, 238, 252))


def test_what_cannot_be_saved_is_refused(tmp_path):
    given = timm.create_model("vit_tiny_patch16_224", **MICRO)
    model = from_timm(given, AxialRoPE(16))
    with pytest.raises(ValueError, match="'position' is not serializable"):
        save_for_hf(model, tmp_path)
    with pytest.raises(ValueError, match="position is a AxialRoPE, which JSON cannot hold"):
        save_model(tmp_path, model)
    named = timm.create_model(NAME, base="vit_tiny_patch16_224", position=AxialRoPE(16), **MICRO)
    with pytest.raises(ValueError, match="'position' is not serializable"):
        save_for_hf(named, tmp_path)
    with pytest.raises(ValueError, match="timm has no name for this ViT, which was made by its class"):
        save_model(tmp_path, vit2dpe.ViT("rope", img_size=32, patch_size=8, **MICRO))
    with pytest.raises(ValueError, match="needs base=, timm's name of a model"):
        timm.create_model(NAME, position="rope")
    with pytest.raises(ValueError, match="no weights were named beside the record"):
        timm.create_model(NAME, pretrained=True, **get_model_args(from_timm(given)))
    with pytest.raises(ValueError, match="checkpoint_path="):
        timm.create_model(NAME, base="vit_tiny_patch16_224", weights="weights.safetensors")
    with pytest.raises(ValueError, match=r"this version can build ViT, DistilledViT, Swin"):
        timm.create_model(NAME, base="x", record=dict(kind="Mamba"))
    with pytest.raises(ValueError, match=r"lacks asked, policies, steps"):
        timm.create_model(NAME, base="x", record=dict(kind="ViT", arguments={}))
