"""DINOv3 of transformers as ours: its last hidden state at the training size and at others, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from vit2dpe import CheckpointError, ConfigError, ViT
from vit2dpe.interop.transformers.convert import from_transformers
from vit2dpe.testing import randomise
from vit2dpe.training.start import describe

SMALL = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, patch_size=4)


def theirs(**options):
    torch.manual_seed(0)
    config = DINOv3ViTConfig(**SMALL | dict(image_size=16, num_register_tokens=3) | options)
    return randomise(DINOv3ViTModel(config)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_gated_mlp=True, hidden_act="silu"),
        dict(num_register_tokens=0, rope_theta=50.0),
    ],
    ids=["plain", "gated", "no registers, another base"],
)
@pytest.mark.parametrize("size", [(16, 16), (12, 24)])
def test_last_hidden_states_are_equal(options, size):
    peer = theirs(**options)
    ours = from_transformers(peer)
    assert isinstance(ours, ViT)
    assert not ours.training
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), peer(x).last_hidden_state, atol=2e-5, rtol=2e-5)


def test_a_saved_folder_and_another_encoding(tmp_path):
    peer = theirs()
    peer.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(from_transformers(tmp_path)(x), from_transformers(peer)(x))
    assert "MixedRoPE" in str(from_transformers(peer, "rope_mixed"))


def test_a_folder_in_parts_is_started_from(tmp_path):
    """By `train --init` and the commands beside it: a classifier with its encoding or another one, and its mean."""
    peer = theirs()
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3))
    )
    start = describe(tmp_path)
    assert (start.size, start.patch, start.mean, start.std) == ((16, 16), (4, 4), (0.1, 0.2, 0.3), (0.4,) * 3)
    assert str(start.position).startswith("rope_dinov3(")
    ours, loaded = start.load(num_classes=3)
    assert loaded.left == ["head.weight", "head.bias"]
    x = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), peer(x).last_hidden_state, atol=2e-5, rtol=2e-5)
    assert start.load("learned")[1].left == ["position.pos_embed"]


def test_other_biases_are_refused():
    with pytest.raises(ConfigError, match="key_bias=True is not covered"):
        from_transformers(theirs(key_bias=True))
    peer = theirs()
    peer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="extra"):
        from_transformers(peer)
