"""`vit2dpe train`: what a run folder holds, what is refused and how, starting from other weights."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name

import pytest
import timm
import torch
import yaml
from torch import nn

from tests.helpers import read_csv
from vit2dpe import MAE, PositionEncoding, Positions, Swin, ViT, load_run
from vit2dpe.cli.commands import COMMANDS, main
from vit2dpe.cli.options import options_of, settings
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig, DataConfig
from vit2dpe.errors import CheckpointError, ConfigError
from vit2dpe.models.simmim import SimMIM
from vit2dpe.training.checkpoint import read_meta
from vit2dpe.training.initial_weights import initialize, jitter_positions, load_weights
from vit2dpe.training.log import read_table
from vit2dpe.training.objectives.images import check, model_spec, train
from vit2dpe.training.optimizer import make_optimizer, make_schedule
from vit2dpe.training.pretrain_settings import PretrainConfig
from vit2dpe.training.pretrain_settings import resolve as resolve_pretraining
from vit2dpe.training.run_folder import run_folder
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig, TrainConfig, check_numbers, resolve
from vit2dpe.training.tasks.classification import ImageTask

MICRO = TrainConfig(
    model=ModelConfig(width=16, depth=1, heads=2, position="rope+learned"),
    data=DataConfig(limit_train=64, limit_test=40, size="8x12"),
    optim=OptimConfig(epochs=2, warmup_epochs=1, batch_size=32),
    run=RunConfig(device="cpu"),
)


def at(config, out, **run):
    return replace(config, run=replace(config.run, out=str(out), **run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(at(MICRO, tmp_path_factory.mktemp("train") / "run"), "vit2dpe train --micro")


def test_a_run_folder_holds_what_it_promises(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "best", "config.yaml", "env.json", "last", "metrics.csv", "summary.md",
    ]  # fmt: skip
    env = json.loads((finished / "env.json").read_text())
    assert {"command", "argv", "git", "torch", "timm", "python", "hardware", "device", "digest"} <= set(env)
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["model"]["position"] == "rope+learned"
    assert settings["data"]["size"] == "8x12"
    assert [row["epoch"] for row in read_csv(finished / "metrics.csv")] == ["1", "2"]
    summary = (finished / "summary.md").read_text()
    assert "vit2dpe train --micro" in summary
    assert "Next: `vit2dpe train --config" in summary
    model = load_run(finished)
    assert model.train_grid == (2, 3)
    assert model.about["digest"] == env["digest"]


def test_the_written_settings_and_the_next_command_work(finished, tmp_path, capsys):
    line = (finished / "summary.md").read_text().partition("Next: `vit2dpe train ")[2].partition("`")[0]
    words = line.split()
    words[words.index("--run.out") + 1] = str(tmp_path / "next")
    assert main(["train", *words, "--optim.epochs", "1", "--smoke"]) == 0
    out = capsys.readouterr().out
    assert "tensors taken" in out
    assert "drawn anew" not in out, "the table of 2x3 is resized to 3x4, everything else fits"
    assert load_run(tmp_path / "next").train_grid == (3, 4)


def test_a_run_has_a_last_and_a_best(finished):
    with pytest.raises(ConfigError, match="unknown checkpoint of a run 'beste'; did you mean 'best'"):
        load_run(finished, which="beste")


def test_resuming_the_finished_run_says_what_changed(finished, capsys):
    train(at(replace(MICRO, resume=True, optim=replace(MICRO.optim, epochs=3)), finished), "again")
    assert "note: optim.epochs was 2, is now 3" in capsys.readouterr().out
    assert (finished / "metrics.csv").read_text().count("\n") == 4


def test_a_folder_that_holds_a_run_or_is_in_use_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match="--resume"):
        train(at(MICRO, finished))
    with run_folder(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "):
        train(at(MICRO, tmp_path))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.position", "roep"], "did you mean 'rope'"),
        (["--model.name", "vit2dpe_tiny_patch4_23"], "did you mean 'vit2dpe_tiny_patch4_32'"),
        (["--model.width", "20", "--model.heads", "3"], "embed_dim must be a multiple of num_heads: got 20 and 3"),
        (["--model.width", "30", "--model.heads", "6"], "even head width, got 5"),
        (["--data.size", "15"], "multiple of the patch 4x4: got 15x15"),
        (["--data.size", "2"], "multiple of the patch"),
        (["--data.name", "digit"], "did you mean 'digits'"),
        (["--optim.lr", "0"], "optim.lr must be above 0"),
        (["--optim.lr", "nan"], "optim.lr must be of type float, above 0, got nan"),
        (["--model.depth", "2.5"], "model.depth must be of type int or null, in [0, 10000], got 2.5"),
        (["--optim.betas", "0.9"], "optim.betas must be of type tuple[float, float] or null, in [0, 1), got 0.9"),
        (["--optim.epochs", "3.5"], "optim.epochs"),
        (["--optim.name", "adamww"], "did you mean 'adamw'"),
        (["--optim.schedule", "cosin"], "did you mean 'cosine'"),
        (["--optim.warmup_epochs", "100"], "below optim.epochs"),
        (["--optim.accumulate", "0"], "optim.accumulate must be at least 1"),
        (["--optim.ema", "1.5"], "in [0, 1)"),
        (["--model.init", "xaviar"], "did you mean 'xavier'"),
        (["--augment.label_smoothing", "1"], "augment.label_smoothing must be in [0, 1), got 1.0"),
        (["--augment.crop", "0"], "augment.crop"),
        (["--augment.crop", "0.5", "--augment.shift", "2"], "takes the place"),
        (["--augment.policy", "rnad"], "did you mean 'rand'"),
        (["--augment.policy", "rand(mag=3)"], "did you mean 'magnitude'"),
        (["--augment.policy", "rand(magnitude=31)"], "0 to 30"),
        (["--augment.mixup=-1"], "augment.mixup must be at least 0"),
        (["--augment.train_sizes", "16,18"], "multiple of the patch 4x4: got 18x18"),
        (["--run.parallel", "dp"], "did you mean 'ddp'"),
        (["--run.precision", "float61"], "precision must be"),
        (["--run.device", "cuda:99"], "--device cpu"),
        (["--init", "/nowhere"], "nothing at /nowhere"),
        (["--model.positon", "rope"], "did you mean --model.position"),
        (["--model.options", '{"class_tokn": 1}'], "did you mean 'class_token'"),
        (["--config", "nothing.yaml"], "there is no file nothing.yaml"),
    ],
)
def test_what_cannot_work_is_refused_before_data_are_read(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vit2dpe.training.objectives.images.load_fitted", None)
    assert main(["train", "--run.out", str(tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "optim.lr is given twice, again in line 3"),
        ("optim:\n  lr: 1\noptim:\n  lr: 2\n", "optim is given twice"),
        ("optim:\n  lr: .nan\n", "finite"),
        ("optim:\n  epochs: true\n", "optim.epochs"),
        ("optim:\n  epochs: many\n", "optim.epochs"),
        ("modle:\n  position: rope\n", "modle"),
        ("model:\n  positon: rope\n", "did you mean 'model.position'"),
        ("model: [1, 2\n", "is no YAML file"),
    ],
)
def test_yaml_says_what_it_means(text, message, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--run.out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_switches_need_no_value():
    """Nor do they take one that is another option's, and --flip, which may be null, is one too."""
    read = partial(settings, "train", TrainConfig)
    config = read(
        ["--smoke", "--run.compile", "False", "--out", "true", "--tensorboard", "--flip", "--ema-warmup=false"]
    )
    assert (config.smoke, config.run.compile, config.run.out, config.run.tensorboard) == (True, False, "true", True)
    assert (config.augment.flip, config.optim.ema_warmup) == (True, False)
    assert read([]) == TrainConfig()


def test_hyphens_switches_and_printing(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("optim:\n  lr: 1e-3\nmodel:\n  position: alibi\n")
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", str(path), "--optim.batch-size", "7", "--run.grad-checkpointing", "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optim"]["lr"] == 0.001
    assert printed["optim"]["batch_size"] == 7
    assert printed["run"]["grad_checkpointing"] is True
    assert printed["model"]["position"] == "alibi"


def test_help_tells_what_settings_mean(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--optim.layer-decay LAYER_DECAY learning rate of a block over that of the next" in text
    assert "Optimizer and schedule" in text
    assert "up to ten, or 1% of a split" in text
    assert "(type: dict, default: {})" in text
    assert "<class" not in text


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.config])
def test_every_setting_has_a_help(command):
    options = options_of(resolve_name(f"vit2dpe.{COMMANDS[command].config}")())
    assert [option.name for option in options if not option.help] == []


def vit(position="rope", size=(8, 12), classes=10, **kwargs):
    return ViT(
        position, img_size=size, patch_size=4, in_chans=1, num_classes=classes, embed_dim=16, depth=2, num_heads=2,
        class_token=False, global_pool="avg", **kwargs,
    )  # fmt: skip


def test_other_encodings_sizes_and_heads_start_from_a_run(finished):
    model = vit("alibi", classes=3, mlp_ratio=2)
    model.blocks = model.blocks[:1]
    loaded = load_weights(model, finished)
    assert loaded.left == ["head.weight", "head.bias"]
    assert {"position.parts.1.pos_embed", "head.weight", "head.bias"} >= {n for n in loaded.unused if "head" in n}
    assert torch.equal(model.blocks[0].attn.qkv.weight, load_run(finished).blocks[0].attn.qkv.weight)
    assert "drawn anew: head.weight" in str(loaded)


def test_weights_of_another_architecture_or_not_finite_are_refused(tmp_path, finished):
    big = ViT("rope", img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(CheckpointError, match=r"another architecture.*of \d+ tensors.*of other shape"):
        load_weights(big, finished)
    state = vit().state_dict()
    state["norm.weight" if "norm.weight" in state else "fc_norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"fc_norm\.weight .* not finite"):
        load_weights(vit(), tmp_path / "w.pth")
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read"):
        load_weights(vit(), tmp_path / "x.pth")


def test_models_come_by_name_or_by_sizes(tmp_path):
    named = check(replace(MICRO, model=ModelConfig(name="vit2dpe_tiny_patch4_32", options={"depth": 1})))
    spec = model_spec(named.model, (8, 12), 1, 10)
    assert spec.kind == "timm"
    model = spec.build()
    assert (model.train_grid, len(model.blocks), model.num_classes) == ((2, 3), 1, 10)
    theirs = model_spec(ModelConfig(name="resnet10t"), (32, 32), 1, 10)
    assert "img_size" not in theirs.arguments
    out = train(
        at(replace(MICRO, smoke=True, model=ModelConfig(name="vit2dpe_tiny_patch4_32", options={"depth": 1})), tmp_path)
    )
    assert load_run(out).about["arguments"]["model_name"] == "vit2dpe_tiny_patch4_32"


@pytest.mark.parametrize("how", ["xavier", "trunc_normal", "gpt2"])
def test_inits_draw_what_they_say(how):
    torch.manual_seed(0)
    model = vit(mlp_ratio=8)
    encoding = [p.clone() for p in model.position.parameters()]
    initialize(model, how)
    up, down = model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc2.weight
    wanted = {"xavier": ((2 / 144) ** 0.5,) * 2, "trunc_normal": (0.02, 0.02), "gpt2": (0.02, 0.01)}[how]
    assert up.std().item() == pytest.approx(wanted[0], rel=0.1)
    assert down.std().item() == pytest.approx(wanted[1], rel=0.1)
    assert not model.blocks[0].mlp.fc1.bias.any()
    assert all(torch.equal(a, b) for a, b in zip(encoding, model.position.parameters(), strict=True))


@pytest.mark.need("D14")
@pytest.mark.parametrize("kind", [TrainConfig, PretrainConfig])
@pytest.mark.parametrize(("epochs", "wanted"), [(1, 0.1), (3, 0.3), (5, 0.5), (6, 5), (100, 5), (300, 5)])
def test_the_default_warm_up_fits_the_epochs_that_were_asked_for(kind, epochs, wanted):
    """The learning rate reaches its peak within it, and falls from there."""
    resolved = {TrainConfig: resolve, PretrainConfig: resolve_pretraining}[kind]
    config = kind()
    config = resolved(replace(config, optim=replace(config.optim, epochs=epochs)))
    check_numbers(config.optim)
    assert config.optim.warmup_epochs == config.optim.warmup == pytest.approx(wanted)
    schedule = make_schedule(make_optimizer(nn.Linear(1, 1), config.optim), config.optim, 20)
    rates = [schedule._get_lr(step)[0] for step in range(20 * epochs)]
    peak = max(range(len(rates)), key=rates.__getitem__)
    assert rates[peak] == pytest.approx(config.optim.lr, rel=0.15 if epochs <= 5 else 0.03)
    assert abs(peak - 20 * wanted) <= 1
    told = replace(config, optim=replace(config.optim, epochs=3, warmup_epochs=5))
    with pytest.raises(ConfigError, match=r"must be below optim\.epochs: got 5 of 3"):
        check_numbers(told.optim)


@pytest.mark.need("D14")
@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_three_epochs_need_no_word_on_warm_up(tmp_path, command):
    words = ["--optim.epochs", "3", "--data.limit_train", "20", "--data.limit_test", "20", "--run.device", "cpu"]
    words += ["--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--run.out", str(tmp_path / "run")]
    words += ["--data.name", "digits"]
    assert main([command, *words]) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["optim"]["warmup_epochs"] == pytest.approx(0.3)
    assert len(read_table(tmp_path / "run" / "metrics.csv")) == 3


SWIN = dict(img_size=32, patch_size=4, embed_dim=24, depths=[2, 4], num_heads=[2, 4], window_size=4,
            num_classes=0)  # fmt: skip
ENCODER = dict(num_classes=0, img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3)


@pytest.mark.need("D6")
@pytest.mark.parametrize(("make", "depths"), [
    (lambda: ViT("rope", **ENCODER), {"blocks": 3}),
    (lambda: ViT("rope", **ENCODER, global_pool="map"), {"blocks": 3, "attn_pool": 3}),
    (lambda: Swin("relative", **SWIN), {"layers": 6}),
    (lambda: SimMIM(Swin("relative", **SWIN)), {"encoder": 6}),
    (lambda: MAE(ViT("rope", **ENCODER), decoder_position="sincos", decoder_embed_dim=32, decoder_depth=5,
                 decoder_num_heads=2), {"encoder": 3, "decoder_blocks": 5}),
    (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24,
                               depths=(2, 4), num_heads=(2, 4)), {"layers": 6}),
])  # fmt: skip
def test_gpt2_divides_by_the_depth_of_the_stream_that_a_block_adds_to(make, depths):
    """GPT-2, section 2.3: by the square root of the number of residual layers, two a block."""
    model = make()
    initialize(model, "gpt2")
    for owner, depth in depths.items():
        last = [
            module.weight for name, module in model.named_modules()
            if name.startswith(f"{owner}.") and name.endswith(("attn.proj", "mlp.fc2"))
        ]  # fmt: skip
        assert len(last) == 2 * depth or owner == "attn_pool"
        for weight in last:
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.15)


def test_everything_on_images_at_once(tmp_path):
    augment = AugmentConfig(
        crop=0.5,
        flip=True,
        policy="rand(ops=1, magnitude=5)",
        erase=0.3,
        mixup=0.8,
        cutmix=1.0,
        train_sizes="8,8x12,16",
    )
    optim = replace(MICRO.optim, accumulate=2, ema=0.9, layer_decay=0.7, betas=(0.9, 0.95), name="lamb")
    config = replace(MICRO, augment=augment, optim=optim)
    out = train(at(config, tmp_path / "a", precision="bfloat16", grad_checkpointing=True))
    task = ImageTask(load_images("digits"), (8, 12), 32, augment=augment)
    sizes = {tuple(task.batch(0, step)["images"].shape[2:]) for step in range(12)}
    assert sizes == {(8, 8), (8, 12), (16, 16)}
    again = train(at(config, tmp_path / "b", precision="bfloat16", grad_checkpointing=True))
    assert (out / "last/model.safetensors").read_bytes() == (again / "last/model.safetensors").read_bytes()


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    stuck = replace(MICRO.optim, lr=1e-12, epochs=9)
    out = train(at(replace(MICRO, optim=stuck), tmp_path, patience=2))
    rows = read_table(out / "metrics.csv")
    assert len(rows) == 3, "the first is the best, two more do not better it"


def test_float16_skips_what_overflows_and_goes_on(tmp_path):
    out = train(at(replace(MICRO, optim=replace(MICRO.optim, epochs=1)), tmp_path, precision="float16"))
    meta = read_meta(out / "last")
    assert meta["state"]["scaler"]["scale"] > 0
    assert meta["state"]["step"] == 2


def test_places_are_jittered_in_training_only(tmp_path):
    model, still = vit("rope_mixed+sincos"), vit("rope_mixed+sincos")
    still.load_state_dict(model.state_dict())
    names = list(model.state_dict())
    jitter_positions(model, 0.5)
    assert list(model.state_dict()) == names
    at = Positions.grid((3, 4))
    for mine, other in zip(encodings(model), encodings(still), strict=True):
        for module in (mine, other):
            module.train()
        once, twice, plain = mine(at), mine(at), other(at)
        found = [s.token if s.token is not None else s.q_rotation.cos for s in (once, twice, plain)]
        assert not torch.allclose(found[0], found[1])
        assert not torch.allclose(found[0], found[2])
        mine.eval()
        again = mine(at)
        assert torch.equal(again.token if again.token is not None else again.q_rotation.cos, found[2])
    with pytest.raises(ConfigError, match="has none of ours"):
        jitter_positions(vit("none"), 0.5)
    config = replace(MICRO, model=replace(MICRO.model, position="rope", jitter=0.5))
    runs = [train(at_(tmp_path, name, config)) for name in ("a", "b")]
    weights = [(run / "last/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1], "the draws are keyed"
    plain = train(at_(tmp_path, "plain", replace(config, model=replace(config.model, jitter=0.0))))
    assert (plain / "last/model.safetensors").read_bytes() != weights[0]


def at_(folder, name, config):
    return at(config, folder / name)


def encodings(model):
    found = [m for m in model.modules() if isinstance(m, PositionEncoding) and m.gives]
    return [m for m in found if not hasattr(m, "terms")]
