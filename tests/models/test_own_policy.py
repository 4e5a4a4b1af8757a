"""A model's own policy and temperature are kept: by timm, by checkpoints, at another size, and named in the card."""

import json

import pytest
import timm
import torch
from timm.models import get_model_args, save_for_hf

from vit2dpe import ConfigError, Swin, ViT, from_timm, load_run, set_policy, use_policy
from vit2dpe.models.card import card
from vit2dpe.models.timm_api import recorded_policies
from vit2dpe.testing import randomise
from vit2dpe.training.checkpoint import read_meta, save_model, write_policy

POLICY, TEMPERATURE = "interpolate(power=(0.5, 1.5))", "log(power=0.5)"
VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
SWIN = dict(img_size=32, patch_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 4), window_size=2, num_classes=5)
MODELS = {
    "vit": ("vit2dpe_tiny_patch8_64", dict(VIT, position="sincos+rope")),
    "swin": ("vit2dpe_swin_tiny_patch2_window4_32", dict(SWIN, position="sincos+rope_mixed", embed_dim=32)),
    "timm": ("vit2dpe_from_timm", dict(VIT, base="vit_tiny_patch16_224", position="rope")),
}
WIDE = (2, 3, 32, 48)


def made(kind):
    name, arguments = MODELS[kind]
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **arguments)).eval()


@torch.no_grad()
def outputs(model):
    return model(torch.randn(WIDE, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", MODELS)
def test_timm_saves_a_model_with_its_policy(kind, tmp_path):
    model = made(kind)
    before = outputs(model)
    set_policy(model, ("scale+" if kind == "swin" else "") + POLICY, temperature=TEMPERATURE)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(outputs(again), outputs(model))
    assert not torch.allclose(outputs(model), before, atol=1e-4)
    assert recorded_policies(again)[-1] == (POLICY, TEMPERATURE)
    with torch.no_grad():
        native = torch.randn(1, 3, 32, 32)
        assert torch.equal(again(native), made(kind)(native)), "at the size of training nothing changes"


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_has_the_policy(kind, tmp_path):
    model = made(kind)
    set_policy(model, POLICY, temperature=TEMPERATURE)
    save_model(tmp_path, model)
    assert torch.equal(outputs(load_run(tmp_path)), outputs(model))


@pytest.mark.parametrize("cls", [ViT, Swin])
def test_a_checkpoint_of_a_class_has_the_policy_beside_its_arguments(cls, tmp_path):
    """So the arguments are those that a training goes on with."""
    arguments = dict(VIT if cls is ViT else SWIN, position="rope")
    arguments |= {} if cls is ViT else dict(position="rope_mixed", embed_dim=32)
    model = randomise(cls(**arguments)).eval()
    set_policy(model, POLICY, temperature=TEMPERATURE)
    save_model(tmp_path, model, arguments)
    meta = read_meta(tmp_path)
    assert "policy" not in meta["arguments"]
    assert meta["policy"] == dict(policy=POLICY, temperature=TEMPERATURE)
    assert torch.equal(outputs(load_run(tmp_path)), outputs(model))
    write_policy(tmp_path, "extrapolate", None)
    plain = load_run(tmp_path)
    assert torch.equal(outputs(plain), outputs(randomised_like(model, cls(**arguments))))


def randomised_like(model, other):
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_a_model_without_a_policy_is_saved_as_ever(tmp_path):
    model = made("vit")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert not {"policy", "temperature"} & json.loads((tmp_path / "config.json").read_text())["model_args"].keys()
    save_model(tmp_path / "run", ViT("rope", **VIT), dict(VIT, position="rope"))
    assert "policy" not in read_meta(tmp_path / "run")
    assert "policy" not in get_model_args(model)


def test_the_constructor_takes_both_and_no_temperature_alone():
    model = ViT("rope", policy=POLICY, temperature="yarn", **VIT)
    assert (model.position.policy.power, type(model.position.temperature).__name__) == ((0.5, 1.5), "YaRNTemperature")
    with pytest.raises(ConfigError, match="goes with a policy"):
        ViT("rope", temperature="log", **VIT)
    with pytest.raises(ConfigError, match="LearnedTable cannot ntk"):
        ViT("learned", policy="ntk", **VIT)


def test_default_is_the_models_own_and_another_policy_is_without_its_temperature():
    model = ViT("rope", **VIT).eval()
    set_policy(model, POLICY, temperature=TEMPERATURE)
    own = outputs(model)
    with use_policy(model, "default", temperature="none"):  # as a sweep spells it
        assert torch.equal(outputs(model), own)
    with use_policy(model, "default", temperature="log"):
        assert model.position.temperature.power == 1
    with use_policy(model, POLICY):
        assert model.position.temperature is None
    set_policy(model, "extrapolate")
    assert model.position.temperature is None
    assert recorded_policies(model) == [("extrapolate", None)]


def test_at_another_size_of_its_own_the_policy_measures_from_there(tmp_path):
    model = made("vit")
    set_policy(model, POLICY, temperature=TEMPERATURE)
    model.set_input_size((32, 48))
    assert model.position.terms[1].policy.train == (4, 6)
    assert model.position.temperature.train == (4, 6)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_second_policy_leaves_those_that_cannot_take_it_the_first(tmp_path):
    model = randomise(timm.create_model("vit2dpe_tiny_patch8_64", **VIT, position="learned+rope")).eval()
    set_policy(model, "resize(mode=plain)")
    set_policy(model, "interpolate")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(outputs(again), outputs(model))
    assert [term.policy.name for term in again.position.terms] == ["resize", "interpolate"]


def test_the_card_names_policy_and_temperature():
    model = made("vit")
    assert card(model)["details"]["Other sizes"] == "any height and width that the patch divides"
    set_policy(model, "interpolate", temperature="log")
    assert card(model)["details"]["Other sizes"].endswith("divides, `interpolate` with temperature `log`")


def test_from_timm_takes_a_temperature_beside_its_policy():
    theirs = timm.create_model("vit_tiny_patch16_224", **{k: VIT[k] for k in VIT if k != "num_classes"}, num_classes=5)
    ours = from_timm(theirs, position="rope", policy="ntk", temperature="log")
    assert recorded_policies(ours) == [("ntk", "log")]
    assert ours.position.temperature is not None
