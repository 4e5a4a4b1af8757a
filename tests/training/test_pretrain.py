"""vit2dpe pretrain and probe: runs, resumes, goes on as a classifier; features are measured right."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import interpolate

from tests.helpers import read_csv
from vit2dpe import MAE, CheckpointError, ConfigError, ViT, load_run
from vit2dpe.cli import main
from vit2dpe.cli.options import settings
from vit2dpe.data.datasets import Images
from vit2dpe.data.settings import DataConfig
from vit2dpe.data.splits import Split
from vit2dpe.models.simmim import SimMIM
from vit2dpe.models.text.heads import TextDecoder
from vit2dpe.plots.reconstruction import LEAK, draw
from vit2dpe.study.evaluate import evaluate_model
from vit2dpe.study.probe import features, knn_probe, linear_probe, probe
from vit2dpe.study.settings import EvaluateConfig, ProbeConfig
from vit2dpe.training.checkpoint import save_model
from vit2dpe.training.distributed import World
from vit2dpe.training.initial_weights import load_weights
from vit2dpe.training.objectives.images import train
from vit2dpe.training.objectives.masked_images import check, masked_spec, pretrain
from vit2dpe.training.pretrain_settings import DecoderConfig, PretrainConfig
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig
from vit2dpe.training.tasks.classification import ImageTask
from vit2dpe.training.tasks.masked_images import MaskedTask


def config(out, **changes):
    settings = PretrainConfig(
        model=ModelConfig(patch=4, width=16, depth=2, heads=2, mlp_ratio=2.0, position="learned"),
        decoder=DecoderConfig(width=16, depth=1, heads=2),
        data=DataConfig(limit_train=64, limit_test=20),
        optim=OptimConfig(lr=3e-3, epochs=2, warmup_epochs=1, batch_size=32),
        run=RunConfig(out=str(out), device="cpu"),
        pictures=2,
    )
    return replace(settings, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain(config(tmp_path_factory.mktemp("pretrain") / "run"), "vit2dpe pretrain --as typed")


# pretraining ------------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_all_of_it(run):
    names = {path.name for path in run.iterdir()}
    expected = {
        "config.yaml",
        "env.json",
        "metrics.csv",
        "summary.md",
        "reconstructions.png",
        "encoder",
        "last",
        "best",
    }
    assert expected <= names
    assert "vit2dpe pretrain --as typed" in (run / "summary.md").read_text()
    assert "--init" in (run / "summary.md").read_text()
    assert [row["epoch"] for row in read_csv(run / "metrics.csv")] == ["1", "2"]
    losses = [float(row["test_loss"]) for row in read_csv(run / "metrics.csv")]
    assert losses[1] < losses[0]
    assert json.loads((run / "last" / "model.json").read_text())["model"] == "MAE"


def test_the_run_and_its_encoder_load(run):
    model, encoder = load_run(run), load_run(run / "encoder")
    assert isinstance(model, MAE)
    assert isinstance(encoder, ViT)
    assert model.norm_pix
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.encoder.forward_features(images), encoder.forward_features(images))


def test_a_stopped_run_goes_on_to_the_same_bits(run, tmp_path):
    """Stopped after an epoch, resumed, and every tensor is that of the run that was not."""
    from vit2dpe.data.datasets import load
    from vit2dpe.seeding import derive_seed
    from vit2dpe.training.engine import fit
    from vit2dpe.training.objectives.masked_images import masked_task

    told = check(config(tmp_path / "again"))
    data = load(told.data)
    spec = masked_spec(told, (16, 16), 1)
    for resume, stop in ((False, 2), (True, None)):
        torch.manual_seed(derive_seed(0, "init"))
        model = spec.build()
        model.init_weights()
        task = masked_task(told, data, (16, 16), model.train_grid, torch.device("cpu"), World())
        fit(model, task, told.optim, told.run, folder=tmp_path, spec=spec, resume=resume, stop_after=stop)
    whole = load_run(run).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_masks_are_drawn_by_key_and_by_sample():
    images = torch.randint(0, 256, (10, 1, 8, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = Split(images, torch.arange(10) % 2)
    data = Images("some", ("a", "b"), split, split, (0.5,), (0.2,), "digest", ())

    def task(world=World(), seed=0):  # noqa: B008 - frozen
        return MaskedTask(ImageTask(data, (8, 12), 4, seed=seed, world=world), (2, 3))

    one, again = task().batch(1, 2), task().batch(1, 2)
    assert torch.equal(one["noise"], again["noise"])
    assert one["noise"].shape == (2, 6)  # what is left of ten
    for other in (task().batch(1, 1), task().batch(0, 2), task(seed=1).batch(1, 2)):
        assert not torch.equal(one["noise"], other["noise"][:2])
    whole, halves = task().batch(0, 0), [task(World(rank, 2)).batch(0, 0) for rank in (0, 1)]
    for name in ("noise", "images", "index"):
        assert torch.equal(whole[name], torch.cat([half[name] for half in halves]))
    assert task().describe()["task"] == "masked pretraining"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(mask_ratio=1.0), r"mask_ratio must be in \(0, 1\), got 1\.0"),
        (dict(pictures=-1), "pictures"),
        (dict(decoder=DecoderConfig(position="ropes")), "did you mean 'rope'"),
        (dict(decoder=DecoderConfig(width=16, heads=3)), "multiple of decoder_num_heads"),
        (dict(model=ModelConfig(pool="map")), "attention pooling"),
        (dict(data=DataConfig(name="digits", size="15")), "multiple of the patch"),
        (dict(init="nowhere"), "nothing at nowhere"),
        (dict(objective="simsim"), "did you mean 'simmim'"),
        (dict(objective="simmim", norm_pix=True), "leave norm_pix out"),
        (dict(objective="simmim", mask_unit=6), "multiple of the patch"),
    ],
)
def test_what_cannot_work_is_refused_before_anything(changes, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        pretrain(config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_simmim_leaves_the_same_folder_and_goes_on(tmp_path):
    told, before = config(tmp_path / "run", objective="simmim", mask_unit=8), torch.get_num_threads()
    told = replace(told, run=replace(told.run, threads=before + 1))
    folder = pretrain(replace(told, optim=replace(told.optim, epochs=1, warmup_epochs=0)))
    assert torch.get_num_threads() == before
    assert isinstance(load_run(folder), SimMIM)
    assert (folder / "reconstructions.png").is_file()
    assert len(read_csv(probe(ProbeConfig(run=str(folder), k=3, device="cpu")))) == 2
    model = ViT("learned", img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0,
                class_token=False, global_pool="avg")  # fmt: skip
    assert len(load_weights(model, folder).taken) == len(model.state_dict()) - 4


def test_named_models_and_smoke(tmp_path):
    named = config(tmp_path / "run", model=ModelConfig(name="vit2dpe_tiny_patch8_64", options={"depth": 1}), smoke=True)
    folder = pretrain(replace(named, data=replace(named.data, size="16")))
    model = load_run(folder)
    assert model.encoder.embed_dim == 192
    assert model.encoder.train_grid == (2, 2)


# going on ---------------------------------------------------------------------------------------------------------


def test_init_takes_the_encoder_and_the_sizes_of_the_run(run, tmp_path):
    from vit2dpe.training.settings import TrainConfig

    told = TrainConfig(
        data=DataConfig(limit_train=64, limit_test=20),
        optim=OptimConfig(epochs=1, warmup_epochs=0, batch_size=32, lr=1e-9),
        run=RunConfig(out=str(tmp_path / "finetuned"), device="cpu"),
        init=str(run),
    )
    model = load_run(train(told))
    assert model.embed_dim == 16
    assert model.about["arguments"]["position"] == "learned"
    weight = load_run(run).encoder.blocks[1].mlp.fc1.weight
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight, weight, rtol=0, atol=1e-6)
    larger = replace(
        told,
        model=replace(told.model, position="rope"),
        data=replace(told.data, size="20x24"),
        run=replace(told.run, out=str(tmp_path / "larger")),
    )
    assert load_run(train(larger)).train_grid == (5, 6)


def test_loading_names_what_was_taken(run):
    sizes = dict(img_size=(20, 24), patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)
    model = ViT("learned", **sizes, num_classes=5, class_token=False, global_pool="avg")
    said = load_weights(model, run)
    assert said.left == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert sorted(said.unused) == ["norm.bias", "norm.weight"]
    assert model.position.pos_embed.shape == (1, 5, 6, 16)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(ViT("learned", **{**sizes, "embed_dim": 32}, class_token=False, global_pool="avg"), run)


# probes -----------------------------------------------------------------------------------------------------------


def test_the_probe_writes_its_table(run, capsys):
    before = torch.get_num_threads()
    table = read_csv(probe(ProbeConfig(run=str(run), k=5, device="cpu", threads=before + 1)))
    assert torch.get_num_threads() == before
    assert [(row["method"], row["pool"], row["n_train"], row["n_test"]) for row in table] == [
        ("linear", "avg", "64", "20"),
        ("knn", "avg", "64", "20"),
    ]
    assert all(0 <= float(row["top1"]) <= 100 for row in table)
    assert "linear  avg    top-1" in capsys.readouterr().out


def test_what_tells_no_classes_apart_is_not_evaluated(run, tmp_path):
    with pytest.raises(ConfigError, match=r"holds a MAE, which is no classifier: .* --init"):
        evaluate_model(EvaluateConfig(model=str(run), data="digits", out=str(tmp_path)))


def test_an_option_of_another_command_is_named_and_nothing_else(capsys):
    assert main(["probe", "--data.limit_train", "64"]) == 2
    assert capsys.readouterr().err == "vit2dpe: unknown option --data.limit_train; did you mean --limit_train?\n"


def test_probes_refuse_what_cannot_work(run, tmp_path):
    for told, reason in (
        (ProbeConfig(), "say which run"),
        (ProbeConfig(run=str(run), pool="token"), "no class token"),
        (ProbeConfig(run=str(run), pool="max"), "unknown pool"),
        (ProbeConfig(run=str(run), k=65), "k must be between 1 and the 64"),
    ):
        with pytest.raises(ConfigError, match=reason):
            probe(replace(told, device="cpu"))
    with pytest.raises(CheckpointError, match=r"model\.json is missing"):
        probe(ProbeConfig(run=str(run.parent), device="cpu"))
    arguments = dict(position="rope", vocab_size=5, embed_dim=8, depth=1, num_heads=2, context=8)
    save_model(tmp_path / "last", TextDecoder(**arguments), arguments)
    with pytest.raises(ConfigError, match="holds a TextDecoder without data, mean, std, train_size"):
        probe(ProbeConfig(run=str(tmp_path), device="cpu"))


def test_features_are_of_the_frozen_model_in_evaluation():
    model = ViT("rope", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, drop_path_rate=0.5)
    images = torch.randint(0, 256, (5, 1, 8, 8)).to(torch.uint8)
    both = [features(model.train(), images, [0.5], [0.2], size=(8, 12), pool="avg") for _ in range(2)]
    assert torch.equal(*both)
    resized = interpolate(images / 255, (8, 12), mode="bicubic", antialias=True).clamp(0, 1)
    x = model.eval().forward_features((resized - 0.5) / 0.2)
    torch.testing.assert_close(both[0], x[:, 1:].mean(1).detach())
    token = features(model, images, [0.5], [0.2], size=(8, 12), pool="token")
    torch.testing.assert_close(token, x[:, 0].detach())


def test_linear_probe_agrees_with_scikit_learn_and_ignores_scale():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    labels = torch.randint(0, 4, (600,), generator=generator)
    x = centres[labels] + 1.2 * torch.randn(600, 6, generator=generator)
    train_x, test_x, train_y, test_y = x[:400], x[400:], labels[:400], labels[400:]
    found = linear_probe(train_x, train_y, test_x, test_y)
    scaler = StandardScaler().fit(train_x.numpy())
    c = 1 / (2 * found["penalty"] * 400)  # scikit-learn: sum of losses + |W|^2 / (2 C)
    theirs = LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(train_x.numpy()), train_y.numpy())
    right = 100 * theirs.score(scaler.transform(test_x.numpy()), test_y.numpy())
    assert abs(found["top1"] - right) <= 1.0
    assert 40 < found["top1"] < 100
    scale = torch.tensor([1e3, 1e-3, 1, 1, 7, 1])
    scaled = linear_probe(train_x * scale + 5, train_y, test_x * scale + 5, test_y)
    assert abs(scaled["top1"] - found["top1"]) <= 1.0


def test_knn_by_hand():
    train_x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    test = torch.tensor([[5.0, 0.1], [0.1, 3.0], [1.0, 1.2]])
    assert knn_probe(train_x, labels, test, torch.tensor([0, 1, 1]), k=1)["top1"] == 100
    # two votes of class 0 at cosine 0.64 and 0.72 against one of class 1 at 0.77: the weights decide
    assert knn_probe(train_x, labels, test[2:], torch.tensor([1]), k=3)["top1"] == 100
    assert knn_probe(train_x, labels, test[2:] - 0.15, torch.tensor([0]), k=3)["top1"] == 0


# pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_say_what_they_use(channels):
    for norm_pix in (False, True):
        vit = ViT(
            "rope", img_size=(8, 12), patch_size=4, in_chans=channels, embed_dim=16, depth=1, num_heads=2, num_classes=0
        )
        model = MAE(vit, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, norm_pix=norm_pix).train()
        images = torch.randn(2, channels, 8, 12)
        figure = draw(model, images, [0.5] * channels, [0.2] * channels, 0.5, noise=torch.rand(2, 6))
        assert len(figure.axes) == 8
        titles = [" ".join(ax.get_title().split()) for ax in figure.axes[:4]]
        assert titles[:2] == ["original", "masked (50%)"]
        assert [LEAK in title for title in titles] == [False, False, norm_pix, norm_pix]
        assert model.training


def test_the_masked_picture_hides_what_the_mask_hides():
    vit = ViT("rope", img_size=(8, 12), patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    model = MAE(vit, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    images, noise = torch.rand(1, 1, 8, 12), torch.tensor([[0.0, 1, 1, 1, 1, 0.1]])
    figure = draw(model, images, [0.0], [1.0], 0.7, noise=noise)
    original, masked, _, pasted = (ax.images[0].get_array() for ax in figure.axes)
    assert (masked[:4, 4:] == 0.5).all()
    assert (masked[:4, :4] == original[:4, :4]).all()
    assert (pasted[:4, :4] == original[:4, :4]).all()
    assert not (pasted[:4, 4:8] == original[:4, 4:8]).all()


# the command ------------------------------------------------------------------------------------------------------


def test_short_names_of_settings(tmp_path, capsys):
    """On the command line and in YAML; where several settings are meant, all are named."""
    read = partial(settings, "pretrain", PretrainConfig)
    (tmp_path / "short.yaml").write_text("data: folder\nepochs: 7\nmodel:\n  width: 24\n")
    config = read(
        ["--config", str(tmp_path / "short.yaml"), "--root=there", "--mask-ratio", "0.5", "--model.depth", "2"]
    )
    assert (config.data.name, config.data.root, config.optim.epochs) == ("folder", "there", 7)
    assert (config.model.width, config.model.depth, config.mask_ratio) == (24, 2, 0.5)
    with pytest.raises(ConfigError, match=r"width may be model.width or decoder.width"):
        read(["--width", "3"])
    with pytest.raises(ConfigError, match=r"unknown option --epoch; did you mean"):
        read(["--epoch", "3"])
    (tmp_path / "twice.yaml").write_text("epochs: 7\noptim:\n  epochs: 8\n")
    with pytest.raises(ConfigError, match=r"optim.epochs is given twice, again in line 3"):
        read(["--config", str(tmp_path / "twice.yaml")])


def test_the_commands_exist_and_explain_themselves(capsys):
    for name in ("pretrain", "probe"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert "--mask-ratio" in text or "--which" in text


def test_the_command_runs(tmp_path, capsys):
    words = ["pretrain", "--data", "digits", "--smoke", "--out"]
    assert main([*words, str(tmp_path / "run")]) == 0
    assert main(["probe", "--run", str(tmp_path / "run"), "--k", "3"]) == 0
    assert main(["probe", "--run", str(tmp_path / "nothing")]) == 2
    assert "is missing" in capsys.readouterr().err
