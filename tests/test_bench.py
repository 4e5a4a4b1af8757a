"""The bench refuses to time what is not equal, and its counters count; clockless gates of what a rotary model costs."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from vit2dpe import ConfigError, ViT, bench
from vit2dpe.bench import BenchConfig, interval, kernels, saved_bytes
from vit2dpe.cli import main

SIZES = dict(img_size=(32, 48), patch_size=8, embed_dim=32, num_heads=2, depth=3, num_classes=2)
IMAGES = torch.randn(2, 3, 32, 48)


def test_a_row_has_ratios_counts_and_a_file(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = "--models vit_small_patch16_rope_224 --sizes 32x48 --batch 1 --depth 1 --repeats 2 --modes training"
    assert main(["bench", *arguments.split(), "--out", str(out)]) == 0
    about = json.loads(out.read_text())
    (row,) = about["rows"]
    assert row["difference"] < 1e-5
    assert row["saved_limit"] <= row["saved_ours"] < row["saved_peer"]
    assert row["kernels_limit"] < row["kernels_ours"]
    assert row["peer_ours"][1] <= row["peer_ours"][0] <= row["peer_ours"][2]
    assert "vit_small_patch16_rope_224, 32x48, training:" in capsys.readouterr().out


def test_what_is_not_equal_gets_no_ratio(monkeypatch):
    made = bench._contenders

    def broken(*args):
        contenders = made(*args)
        with torch.no_grad():
            contenders["ours"].norm.weight.mul_(1.01)
            contenders["ours"].fc_norm.weight.mul_(1.01) if hasattr(contenders["ours"].fc_norm, "weight") else None
        return contenders

    monkeypatch.setattr(bench, "_contenders", broken)
    name = "vit_small_patch16_224"
    config = BenchConfig(models=name, sizes="32", batch=1, depth=1, repeats=1, modes="inference", out="/dev/null")
    monkeypatch.setattr(bench, "write_atomically", lambda *args: None)
    (row,) = bench.bench(config)
    assert "failed" in row
    assert "peer_ours" not in row


def test_bad_settings():
    with pytest.raises(ConfigError, match="inference and training"):
        bench.bench(BenchConfig(modes="both"))
    with pytest.raises(ConfigError, match="not a model of timm"):
        bench.bench(BenchConfig(models="vit_smal"))


def test_the_interval_holds_the_median():
    assert interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    median, low, high = interval([float(i) for i in range(101)])
    assert (median, low, high) == (50.0, 40.0, 61.0)


def test_a_rotary_model_saves_what_one_without_saves_and_adds_one_kernel_a_block():
    nothing, rotary = (ViT(word, **SIZES).train() for word in ("none", "rope"))
    deeper = ViT("rope", **SIZES | dict(depth=6)).train()
    assert saved_bytes(rotary, IMAGES) < 1.02 * saved_bytes(nothing, IMAGES)
    blocks = kernels(deeper, IMAGES) - kernels(rotary, IMAGES)
    plain = ViT("none", **SIZES | dict(depth=6)).train()
    assert blocks - (kernels(plain, IMAGES) - kernels(nothing, IMAGES)) == 3


@pytest.mark.parametrize(("word", "theirs"), [("logcpb", "mlp-swin"), ("logcpb(form=cr)", "mlp"), ("relative", "bias")])
def test_a_bias_costs_no_more_operations_a_block_than_timms(word, theirs):
    """What the blocks have in common is made once a forward; timm keeps it in buffers of every block."""
    sizes = dict(img_size=(32, 48), patch_size=8, embed_dim=32, num_heads=2, num_classes=2)
    relpos = timm.models.VisionTransformerRelPos

    def a_block(make):
        return (kernels(make(6).eval(), IMAGES) - kernels(make(3).eval(), IMAGES)) / 3

    ours = a_block(lambda depth: ViT(word, depth=depth, **sizes))
    assert ours <= a_block(lambda depth: relpos(rel_pos_type=theirs, depth=depth, **sizes))
    assert ours - a_block(lambda depth: ViT("none", depth=depth, **sizes)) <= 8
