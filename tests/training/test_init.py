"""`vit2dpe train --init NAME|FILE|RUN`: what comes with the weights, what settings change, and what is read back."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from tests.data.pictures import photos
from tests.helpers import randn, shaken
from vit2dpe import ViT, from_timm
from vit2dpe.cli import main
from vit2dpe.data.datasets import load_images
from vit2dpe.training.checkpoint import load_run, read_meta, save_model
from vit2dpe.training.objectives.images import as_weights, check
from vit2dpe.training.settings import TrainConfig
from vit2dpe.training.start import describe

MICRO = dict(depth=2, embed_dim=48, num_heads=3, img_size=(32, 64))
SHORT = ("--epochs", "1", "--device", "cpu", "--threads", "1")


@pytest.fixture
def mine(cache, tmp_path):
    return photos(tmp_path / "photos")


@pytest.fixture
def weights(tmp_path):
    """(text, model): a name of timm with weights of a local file in place of a download."""
    torch.manual_seed(0)
    model = shaken(timm.create_model("vit_tiny_patch16_224", **MICRO))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    given = MICRO | dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "w.safetensors"), custom_load=False))
    return f"vit_tiny_patch16_224({', '.join(f'{key}={value!r}' for key, value in given.items())})", model


def run(*words):
    return main(["train", *map(str, words)])


def test_a_name_of_timm_is_finetuned_on_photos_and_read_back_without_its_weights(
    mine, weights, tmp_path, capsys, monkeypatch
):
    text, theirs = weights
    out = tmp_path / "out"
    assert run("--root", mine, "--init", text, "--freeze", 2, "--out", out, *SHORT) == 0
    told = capsys.readouterr().out
    assert "weights of timm, learned, trained at 32x64, patch 16" in told
    assert "drawn anew: head.weight, head.bias" in told
    assert "note: images are normalized as those of the weights were: mean and deviation (0.500, 0.500, 0.500)" in told
    assert "optim.lr 0.0003, optim.layer_decay 0.75, 2 blocks frozen" in told
    meta = read_meta(out / "last")
    assert (meta["train_size"], meta["mean"], meta["std"]) == ([32, 64], [0.5] * 3, [0.5] * 3)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["data"]["size"], settings["model"]["position"], settings["model"]["width"]) == (
        "32x64", "learned", 48,
    )  # fmt: skip
    (tmp_path / "w.safetensors").unlink()
    monkeypatch.setattr("timm.models._builder.load_state_dict", None)
    model, reference = load_run(out), from_timm(theirs)
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, reference.state_dict()[name])
    }
    assert changed == {"head.weight", "head.bias"}
    x = randn(2, 3, 32, 64)
    assert torch.equal(model.forward_features(x), reference.eval().forward_features(x))
    assert run("--root", mine, "--init", text, "--freeze", 2, "--out", out, *SHORT, "--resume") == 0
    assert "learned, trained at 32x64" in capsys.readouterr().out
    assert main(["predict", str(out), str(next(mine.rglob("*.png"))), "--device", "cpu"]) == 0
    words = ["evaluate", "--model", str(out), "--root", str(mine), "--sizes", "32x64,48x96", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "ev"), "--policies", "resize"]) == 0
    assert torch.equal(describe(out).load()[0](x), model(x))


def test_settings_exchange_the_encoding_and_the_size_and_a_config_repeats_it(mine, weights, tmp_path, capsys):
    text, theirs = weights
    out = tmp_path / "out"
    words = ("--root", mine, "--init", text, "--position", "rope", "--size", "48x32", "--freeze", 1)
    assert run(*words, "--out", out, *SHORT) == 0
    assert "not used: head.weight, head.bias, position.pos_embed" in capsys.readouterr().out
    model = load_run(out)
    assert (model.train_grid, read_meta(out / "last")["arguments"]["position"]) == ((3, 2), "rope")
    assert torch.equal(model.blocks[0].attn.qkv.weight, from_timm(theirs, "rope").blocks[0].attn.qkv.weight)
    assert run("--config", out / "config.yaml", "--out", tmp_path / "again") == 0
    again = load_run(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    words = ("--root", mine, "--init", out, "--out", tmp_path / "next", "--position", "alibi", *SHORT)
    assert run(*words) == 0
    assert "trained at 48x32" in capsys.readouterr().out
    shutil.rmtree(out)
    assert run(*words, "--resume") == 0


def test_a_model_of_timm_that_is_none_of_ours_is_finetuned_as_it_is(mine, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    text = f"test_resnet(pretrained_cfg_overlay={{'file': '{tmp_path / 'w.safetensors'}', 'input_size': (3, 32, 32)}})"
    assert run("--root", mine, "--init", text, "--freeze", 1, "--out", tmp_path / "out", *SHORT) == 0
    trained = load_run(tmp_path / "out").state_dict()
    assert torch.equal(trained["bn1.running_mean"], model.state_dict()["bn1.running_mean"])
    assert not torch.equal(trained["layer4.0.bn1.running_mean"], model.state_dict()["layer4.0.bn1.running_mean"])
    capsys.readouterr()
    assert run("--root", mine, "--init", text, "--position", "rope", "--out", tmp_path / "no", *SHORT) == 2
    assert "test_resnet: ResNet is not covered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "{}/w.safetensors"], "architecture of {}/w.safetensors is not known"),
        (["--init", "{}/nothing.pth"], "nothing at {}/nothing.pth to start from"),
        (["--init", "vit_tiny_patch16_2244"], "did you mean 'vit_tiny_patch16_224'"),
        (["--init", "{}/run", "--freeze", "3"], "ViT has 2 blocks, got 3"),
        (["--init", "{}/run", "--position", "roep"], "did you mean 'rope'"),
        (["--init", "{}/run", "--patch", "7"], "multiple of the patch"),
        (["--init", "{}/run", "--size", "33"], "multiple of the patch"),
        (["--init", "{}/run", "--options", '{"num_classes": 3}'], "num_classes is decided by the data"),
        (["--freeze", "1"], "optim.freeze keeps weights that were trained before: --init"),
    ],
)
def test_what_cannot_be_started_is_refused_before_data_are_read(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vit2dpe.training.objectives.images.load_fitted", None)
    sizes = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, patch_size=8, num_classes=3)
    torch.manual_seed(0)
    save_model(tmp_path / "run", ViT("rope", **sizes), dict(sizes, position="rope"))
    save_file(ViT("rope", **sizes).state_dict(), tmp_path / "w.safetensors")
    assert run(*(word.replace("{}", str(tmp_path)) for word in words), "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message.replace("{}", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_widths_and_an_untrained_frozen_table_end_in_one_line(mine, weights, tmp_path, capsys):
    text, _ = weights
    for words, message in (
        (("--width", 24), "is of another architecture"),
        (("--position", "relative", "--freeze", 1), "would leave what was drawn anew untrained: blocks.0.attn"),
    ):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert run("--root", mine, "--init", text, *words, "--out", tmp_path / "out", *SHORT) == 2
        assert message in capsys.readouterr().err


def test_presets_of_finetuning_fill_what_is_not_given(tmp_path):
    optim = TrainConfig.of(init="vit_tiny_patch16_224").optim
    assert (optim.lr, optim.layer_decay, optim.epochs, optim.warmup) == (3e-4, 0.75, 30, 3)
    optim = TrainConfig.of(init="vit_tiny_patch16_224", epochs=2, lr=1e-3).optim
    assert (optim.lr, optim.layer_decay, optim.epochs, optim.warmup) == (1e-3, 0.75, 2, 0.2)
    assert TrainConfig.of().optim == TrainConfig().optim
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "model.json").write_text(json.dumps({"model": "MAE"}))
    assert TrainConfig.of(init=str(tmp_path)).optim == TrainConfig().optim


def test_the_architecture_of_a_run_comes_with_all_its_options(tmp_path):
    sizes = dict(embed_dim=48, depth=2, num_heads=3, img_size=[16, 24], patch_size=8, num_classes=3, qk_norm=True)
    save_model(tmp_path, ViT(**{**sizes, "position": "rope", "img_size": (16, 24)}), dict(sizes, position="rope"))
    config = check(TrainConfig.of(init=str(tmp_path), root="somewhere"))
    assert (config.data.size, config.model.patch, config.model.width, config.model.mlp_ratio) == ((16, 24), 8, 48, None)
    assert describe(tmp_path).changed(size=(32, 32)).arguments["qk_norm"] is True


@pytest.mark.parametrize(("channels", "mean"), [(3, (0.1, 0.2, 0.6)), (1, (0.3,)), (4, (0.3,) * 4)])
def test_images_are_normalized_as_those_of_the_weights_were(channels, mean, weights):
    start = replace(describe(weights[0]), mean=(0.1, 0.2, 0.6), std=(0.2, 0.3, 0.4))
    data = load_images("digits", limit_train=20, limit_test=20)
    data = replace(data, mean=(0.5,) * channels, std=(0.5,) * channels)
    told = []
    normalized = as_weights(start, data, told.append)
    assert normalized.mean == pytest.approx(mean)
    assert "mean and deviation" in told[0]
    assert as_weights(start, normalized, told.append) == normalized
    assert len(told) == 1
