"""`vit2dpe info` has what a model is, of each kind of source; what cannot be read is one line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from vit2dpe import ViT
from vit2dpe.cli import main


def told(capsys) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_names_of_timm(capsys):
    assert main(["info", "vit_tiny_patch16_224", "swinv2_tiny_window8_256", "resnet18"]) == 0
    lines = told(capsys)
    assert lines[:5] == [
        "vit_tiny_patch16_224",
        "read from weights of timm",
        "model ViT, 12 blocks of 192 channels, 3 heads; 5.72 M parameters",
        "encoding learned",
        "trained at 224x224 pixels, 3 channels: 14x14 patches of 16x16",
    ]
    assert "leading 1 cls_token" in lines
    assert "at other sizes resize; or interpolate" in lines
    assert "encoding logcpb" in lines
    assert "encoding its own" in lines
    assert [line for line in lines if line.startswith("exchange no: resnet18: ResNet is not covered")]


def test_a_folder_of_transformers(capsys, tmp_path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config.update(dict(image_size=[16, 24], patch_size=8))
    transformers.ViTModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.1] * 3, image_std=[0.4] * 3)))
    assert main(["info", str(tmp_path)]) == 0
    lines = told(capsys)
    assert "read from weights of transformers" in lines
    assert "trained at 16x24 pixels, 3 channels: 2x3 patches of 8x8" in lines
    assert "encoding learned(resize=plain)" in lines
    assert "normalized mean 0.100 0.100 0.100, std 0.400 0.400 0.400" in lines


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("vit_tiny_patch16_223", "did you mean 'vit_tiny_patch16_224'"),
        ("weights.pth", "nothing at weights.pth to start from"),
        (None, "give a model: a name of timm, a file"),
        ("alone.pth", "the architecture of alone.pth is not known"),
    ],
)
def test_what_cannot_be_read(source, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(ViT("rope", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2).state_dict(), "alone.pth")
    assert main(["info", *([source] if source else [])]) == 2
    assert line in capsys.readouterr().err
