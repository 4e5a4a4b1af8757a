"""Swin and Swin V2 of transformers as ours: outputs at their own size, at a larger one and at a rectangle; refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from vit2dpe import ConfigError, Swin, from_transformers
from vit2dpe.testing import randomise

SMALL = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4, image_size=32)


def theirs(name: str, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return randomise(kind(kind.config_class(**SMALL | options))).eval()


# Windows of 4 tokens of 4 pixels, and of 8 in the second stage; theirs of the first Swin are filled up too.
@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("SwinForImageClassification", {}, [(32, 32), (40, 56)]),
        ("SwinForImageClassification", dict(image_size=64, qkv_bias=False), [(64, 64), (40, 72)]),
        ("SwinModel", {}, [(32, 32), (64, 96)]),
        ("Swinv2ForImageClassification", {}, [(32, 32), (64, 96)]),
        ("Swinv2ForImageClassification", dict(image_size=64, pretrained_window_sizes=[3, 3]), [(64, 64), (32, 96)]),
        ("Swinv2Model", {}, [(32, 32), (96, 64)]),
    ],
)
def test_outputs_and_files(name, options, sizes, tmp_path):
    fresh = theirs(name, **options)
    ours = from_transformers(fresh)
    assert isinstance(ours, Swin)
    for size in sizes:
        x, peer = torch.randn(2, 3, *size), copy.deepcopy(fresh)  # theirs loses its shift at the first small grid
        with torch.no_grad():
            out = peer(x)
            want = out.logits if "Classification" in name else out.pooler_output
            torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)
            if name == "SwinModel":
                torch.testing.assert_close(ours.forward_features(x).flatten(1, 2), out.last_hidden_state)
    fresh.save_pretrained(tmp_path)
    again = from_transformers(tmp_path)
    x = torch.randn(1, 3, *sizes[1])
    assert torch.equal(again(x), ours(x))


def test_what_is_not_covered_is_named():
    with pytest.raises(ConfigError, match="stage 1 of this swin has 2x2 tokens and windows of 4"):
        from_transformers(theirs("SwinModel", image_size=16))
    with pytest.raises(ConfigError, match="a swin with layer_norm_eps=1e-06 is not covered, only 1e-05"):
        from_transformers(theirs("SwinModel", layer_norm_eps=1e-6))


def test_another_encoding():
    ours = from_transformers(theirs("SwinModel"), "rope_mixed")
    assert not [name for name in ours.state_dict() if "bias_table" in name]
