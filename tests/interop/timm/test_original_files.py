"""Original files that timm reads, ours reads: what a mask token is in is not always an autoencoder."""

import pytest
import timm
import torch
from torch import nn

from tests.helpers import randn
from vit2dpe import ViT, from_timm
from vit2dpe.interop.timm.read import read
from vit2dpe.training.initial_weights import load_weights

SMALL = dict(depth=2, embed_dim=48, num_heads=3)


def create(name, **more):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | more).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def dinov2(model):
    """DINOv2's names: a row of the table for the class token alone, its registers, its gated MLP, its mask token."""
    state = dict(model.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        row = torch.randn_like(state["cls_token"])
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - row
    if "SwiGLU" in type(model.blocks[0].mlp).__name__ or hasattr(model.blocks[0].mlp, "gate_last"):
        state = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for name, v in state.items()}
    return state | {"mask_token": torch.randn(1, model.embed_dim)}


def dinov3(model):
    state = {
        name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v
        for name, v in model.state_dict().items()
    }
    state["storage_tokens"] = state.pop("reg_token")
    return state | {"mask_token": torch.randn(1, model.embed_dim), "rope_embed.periods": torch.ones(4)}


def pretrained(model):
    """BEiT's and EVA's: a mask token, tables of indices."""
    return model.state_dict() | {"mask_token": torch.randn(1, 1, model.embed_dim)}


FILES = {
    "vit_small_patch14_dinov2": dinov2,
    "vit_small_patch14_reg4_dinov2": dinov2,
    "vit_giant_patch14_dinov2": dinov2,
    "vit_giant_patch14_reg4_dinov2": dinov2,
    "vit_small_patch16_dinov3": dinov3,
    "beit_base_patch16_224": pretrained,
    "eva02_tiny_patch14_224": pretrained,
}


@pytest.mark.need("B1")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # timm resizes a table to its own size
@pytest.mark.filterwarnings("ignore:torch.searchsorted.*non-contiguous:UserWarning")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_from_timm_reads_them_as_timm_does(name, wrapped):
    side = 56 if "14" in name else 64  # the files are square
    more = dict(img_size=side, num_classes=0)
    theirs = create(name, **more)
    original = FILES[name](theirs)
    ours = from_timm(name, weights={"model": original} if wrapped else original, **SMALL, **more)
    x = randn(2, 3, side, side)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)


@pytest.mark.need("B1")
@pytest.mark.parametrize("name", [name for name, of in FILES.items() if of is dinov2])
@torch.no_grad()
def test_a_vit_reads_dinov2_itself(name, tmp_path):
    theirs = create(name, img_size=(56, 84), num_classes=0)
    original, x = dinov2(theirs), randn(2, 3, 56, 84)
    torch.save({"teacher": 1, "state_dict": original}, tmp_path / "weights.pth")
    recipe = read(theirs)
    for load in (
        lambda model: model.load_state_dict(original),
        lambda model: load_weights(model, tmp_path / "weights.pth"),
    ):
        ours = ViT("learned", **recipe.arguments).eval()
        load(ours)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)
