"""A model that has nothing of ours is refused by name, with what makes it one of ours."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import ViTConfig, ViTModel

from tests.helpers import randn
from vit2dpe import ConfigError, ViT, attend, attention_maps, explain, frozen, set_policy, use_policy
from vit2dpe.attention.maps import summary

pytestmark = pytest.mark.need("F3")
SIZES = dict(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
X = randn(1, 3, 32, 32)


def of_transformers():
    sizes = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))


OTHERS = {
    "timm": (lambda: VisionTransformer(**SIZES), r"^VisionTransformer has no .*; vit2dpe\.from_timm\(model\) makes"),
    "a timm CNN": (lambda: timm.create_model("resnet10t"), r"^ResNet has no .*; vit2dpe\.from_timm\(model\) makes"),
    "transformers": (of_transformers, r"^ViTModel has no .*; vit2dpe\.from_transformers\(model\) makes"),
    "a layer": (
        lambda: nn.Linear(32, 3),
        r"^Linear has no .*; vit2dpe\.from_timm\(model\) or vit2dpe\.from_transformers\(model\)",
    ),
}


def maps_of(model):
    with attention_maps(model):
        model(X)


def frozen_of(model):
    with frozen(model):
        pass


def policy_of(model):
    with use_policy(model):
        pass


USES = [
    maps_of,
    frozen_of,
    policy_of,
    lambda m: set_policy(m, "interpolate"),
    lambda m: explain(m, 32),
    lambda m: summary(m, X),
]


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_a_model_of_others_is_refused_by_name(make, message):
    model = make().eval()
    for use in USES:
        with pytest.raises(ConfigError, match=message):
            use(model)


def test_what_has_an_attention_is_not_refused():
    class Own(nn.Module):  # an author's module, which calls the one attention
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            return attend(*self.qkv(x)[:, None].chunk(3, dim=-1))

    model = nn.Sequential(Own())
    with attention_maps(model) as maps:
        model(randn(2, 5, 8))
    assert maps["0"].shape == (2, 1, 5, 5)
    with attention_maps(nn.TransformerEncoderLayer(8, 2)) as maps:
        pass
    assert maps == {}
    with attention_maps(ViT("none", **SIZES)) as maps, torch.no_grad():
        pass
    with frozen(ViT("none", **SIZES)):
        pass
