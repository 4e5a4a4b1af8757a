"""ViTs of transformers as ours: outputs at their own size and at a rectangle, files of either spelling, and back."""

from __future__ import annotations

import pytest
import torch
import transformers

from vit2dpe import CheckpointError, ConfigError, from_transformers
from vit2dpe.interop.transformers.vit_names import FAMILIES, to_transformers
from vit2dpe.models.deit import DistilledViT
from vit2dpe.testing import randomise

SMALL = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, patch_size=8, image_size=32
)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
TEXT |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)

# Class -> what of its output ours computes, and by what.
LOGITS, STATES, POOLED, FEATURES = "logits", "last_hidden_state", "pooler_output", "image_embeds"
CLASSES = {
    "ViTForImageClassification": LOGITS,
    "ViTModel": STATES,
    "DeiTForImageClassification": LOGITS,
    "DeiTForImageClassificationWithTeacher": LOGITS,
    "DeiTModel": STATES,
    "BeitForImageClassification": LOGITS,
    "BeitModel": STATES,
    "Dinov2Model": STATES,
    "Dinov2WithRegistersModel": STATES,
    "IJepaModel": STATES,
    "IJepaForImageClassification": LOGITS,
    "CLIPVisionModel": POOLED,
    "CLIPVisionModelWithProjection": FEATURES,
    "SiglipVisionModel": POOLED,
    "SiglipForImageClassification": LOGITS,
    "CLIPModel": FEATURES,
    "SiglipModel": FEATURES,
}


def theirs(name: str, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    settings = SMALL | options
    if kind.config_class in (transformers.CLIPConfig, transformers.SiglipConfig):
        settings = dict(vision_config=settings, text_config=TEXT, projection_dim=24, num_labels=5)
    elif "hidden_act" not in options:
        settings |= dict(num_labels=5)
    if name.startswith("Beit"):
        settings |= dict(use_relative_position_bias=True)
    return randomise(kind(kind.config_class(**settings))).eval()


def outputs(peer, ours, what, x):
    resized = "Dinov2" not in type(peer).__name__ and x.shape[-2:] != (32, 32)  # DINOv2's are always
    more = dict(interpolate_pos_encoding=True) if resized else {}
    if type(peer).__name__ in ("CLIPModel", "SiglipModel"):
        found = peer.get_image_features(x, **more)
        return ours(x), found if isinstance(found, torch.Tensor) else found.pooler_output
    return (ours.forward_features(x) if what == STATES else ours(x)), getattr(peer(x, **more), what)


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_are_equal_and_so_are_files_and_the_way_back(name, tmp_path):
    peer = theirs(name)
    ours = from_transformers(peer)
    with torch.no_grad():
        for size in [(32, 32), (24, 48)][: 1 if name.startswith("Beit") else 2]:
            a, b = outputs(peer, ours, CLASSES[name], torch.randn(2, 3, *size))
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    peer.save_pretrained(tmp_path)  # in the spelling before transformers 5, where there is one
    again = from_transformers(tmp_path)
    assert type(again) is type(ours)
    assert isinstance(ours, DistilledViT) == name.endswith("WithTeacher")
    for mine, read in zip(ours.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, read)
    if (family := peer.config.model_type) in FAMILIES:
        other = type(peer)(peer.config).eval()
        missing, unexpected = other.load_state_dict(to_transformers(ours, family), strict=False)
        assert not unexpected
        assert not [name for name in missing if "pooler" not in name and "mask_token" not in name]
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(*(getattr(model(x), CLASSES[name]) for model in (other, peer)))


@pytest.mark.parametrize(
    "options", [dict(use_swiglu_ffn=True), dict(hidden_act="gelu_new")], ids=["gated", "another activation"]
)
def test_other_mlps(options, tmp_path):
    peer = theirs("Dinov2Model", **options)
    ours, x = from_transformers(peer), torch.randn(1, 3, 24, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), peer(x).last_hidden_state, atol=1e-5, rtol=1e-5)
    peer.save_pretrained(tmp_path)
    assert torch.equal(from_transformers(tmp_path).forward_features(x), ours.forward_features(x))
    other = transformers.Dinov2Model(peer.config).eval()
    assert not other.load_state_dict(to_transformers(ours, "dinov2"), strict=False).unexpected_keys
    torch.testing.assert_close(other(x).last_hidden_state, peer(x).last_hidden_state)


def test_another_encoding_keeps_all_else():
    ours = from_transformers(theirs("ViTModel"), "rope")
    assert "position.pos_embed" not in ours.state_dict()
    with pytest.raises(ConfigError, match="a vit has a learned table, and this model AxialRoPE"):
        to_transformers(ours, "vit")


def test_what_is_not_covered_is_named():
    with pytest.raises(ConfigError, match="reads 96 channels, class token and mean of the patches"):
        from_transformers(theirs("Dinov2ForImageClassification"))
    with pytest.raises(ConfigError, match="a vit with hidden_act='mish' is not covered, only gelu"):
        from_transformers(theirs("ViTModel", hidden_act="mish"))
    with pytest.raises(ConfigError, match="use_shared_relative_position_bias=True is not covered"):
        from_transformers(theirs("BeitModel", use_shared_relative_position_bias=True))
    peer = theirs("ViTModel")
    peer.register_buffer("extra", torch.zeros(1))
    with pytest.raises(CheckpointError, match="no place for: extra"):
        from_transformers(peer)
    ours = from_transformers(theirs("Dinov2Model"))
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.ls1"):
        to_transformers(ours, "vit")
    with pytest.raises(ConfigError, match="unknown family 'dinov1'; did you mean 'dinov2'"):
        to_transformers(ours, "dinov1")
