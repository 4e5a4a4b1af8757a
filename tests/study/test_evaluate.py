"""`vit2dpe evaluate`: any timm model and any run, swept; what cannot work is one line before anything is measured."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import read_csv
from vit2dpe import ConfigError, DataError, sweep
from vit2dpe.cli import main
from vit2dpe.models.spec import ModelSpec
from vit2dpe.study import EvaluateConfig, StudyConfig, evaluate_model, study
from vit2dpe.study.rows import COLUMNS
from vit2dpe.training.checkpoint import write_checkpoint

MICRO = "embed_dim=48, depth=1, num_heads=3, num_classes=3"
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def folder(tmp_path):
    """Three classes of one colour each, 2 + 3 + 4 images of different sizes."""
    for n, (name, colour) in enumerate(COLOURS.items(), 2):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (30 + 10 * i, 40), colour).save(tmp_path / "val" / name / f"{i}.png")
    return tmp_path


def run(tmp_path, **settings):
    return evaluate_model(EvaluateConfig(out=str(tmp_path / "out"), **settings))


def test_a_model_of_timm_at_sizes_and_modes(folder, tmp_path, capsys):
    rows = run(
        tmp_path,
        model=f"vit_tiny_patch16_224(img_size=(32, 48), {MICRO})",
        data=str(folder),
        sizes="32x48,48,64x32",
        modes="scale,canvas",
        train_size="32x48",
        untrained=True,
    )
    assert [(r.mode, r.height, r.width) for r in rows] == [
        (mode, *size) for mode in ("scale", "canvas") for size in ((32, 48), (48, 48), (64, 32))
    ]
    assert all(r.n == 9 and r.train_size == (32, 48) for r in rows)
    said = capsys.readouterr().out
    assert "images: 9 used of 9" in said
    assert "| scale | vit_tiny_patch16_224 | default | none |" in said
    table = read_csv(tmp_path / "out" / "results.csv")
    assert tuple(table[0]) == COLUMNS[: COLUMNS.index("depth")]
    assert [float(row["value"]) for row in table] == [row.top1 for row in rows]
    assert json.loads((tmp_path / "out" / "env.json").read_text())["timm"] == timm.__version__


def test_ours_with_every_policy_and_weights_from_a_file(folder, tmp_path):
    """The numbers are those of `sweep` on the same pixels, labels in the order of the class names."""
    name = f"vit2dpe_tiny_patch4_32(position='rope', {MICRO})"
    torch.manual_seed(3)
    model = timm.create_model(
        "vit2dpe_tiny_patch4_32", position="rope", embed_dim=48, depth=1, num_heads=3, num_classes=3
    )
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    rows = run(
        tmp_path, model=name, data=str(folder), sizes="32,24x48", checkpoint=str(tmp_path / "weights.safetensors"),
        temperatures="none,log", crop=1.0,
    )  # fmt: skip
    assert [r.policy for r in rows[::4]] == ["extrapolate", "interpolate", "ntk", "yarn"]
    labels = torch.tensor([0] * 2 + [1] * 3 + [2] * 4)
    images = torch.tensor(list(COLOURS.values())).float()[labels, :, None, None].expand(-1, -1, 32, 48) / 255 * 2 - 1
    expected = sweep(model, [(images, labels)], [(32, 32), (24, 48)], temperatures=("none", "log"))
    assert [r.top1 for r in rows] == [r["top1"] for r in expected]
    assert [r.loss for r in rows] == pytest.approx([r["loss"] for r in expected], rel=1e-4)
    assert len({round(r.loss, 3) for r in rows}) > 1


def test_a_limit_is_balanced_and_said(folder, tmp_path, capsys):
    rows = run(tmp_path, model="test_resnet(num_classes=3)", data=str(folder), untrained=True, limit=4, sizes="64")
    assert rows[0].n == 4
    assert "images: 4 used of 9" in capsys.readouterr().out


def test_a_run_of_a_study_keeps_its_numbers(tmp_path):
    micro = dict(encodings="rope", smoke=True, sizes="16,24", modes="scale", width=16, depth=1, heads=2)
    study(StudyConfig.of(micro, out=str(tmp_path / "study")))
    (trial,) = (tmp_path / "study" / "cells").iterdir()
    rows = run(tmp_path, model=str(trial), data="digits", sizes="16,24", limit=40)
    measured = read_csv(tmp_path / "study" / "results.csv")
    table = [(r["encoding"], r["policy"], float(r["top1"]), float(r["height"])) for r in measured]
    assert [(r.encoding, r.policy, r.top1, r.height) for r in rows] == table


def test_folders_named_by_imagenets_synsets_are_numbered_as_the_model_does(tmp_path):
    for synset in ("n01440764", "n02123045"):  # 0 and 281
        (tmp_path / synset).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / synset / "a.png")
    from vit2dpe.study.evaluate import load_subject, load_test_images

    config = EvaluateConfig(model="test_resnet", data=str(tmp_path), untrained=True)
    data, total = load_test_images(config, load_subject(config), (32, 32))
    ((images, labels),) = data
    assert (total, labels.tolist(), images.shape) == (2, [0, 281], (2, 3, 32, 32))


@pytest.fixture
def numbered(tmp_path):
    """Twelve class folders, 0 to 11, with 1 to 12 images: text has 10 before 2, timm's reader after 9."""
    for k in range(12):
        (tmp_path / "data" / str(k)).mkdir(parents=True)
        for i in range(k + 1):
            Image.new("RGB", (32, 32), (20 * k, 99, 0)).save(tmp_path / "data" / str(k) / f"{i}.png")
    return tmp_path / "data"


def always(index):
    """A model that says one class, whatever it sees."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=12)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.nn.functional.one_hot(torch.tensor(index), 12).float()
    return model


@pytest.mark.need("D2")
@pytest.mark.parametrize("index", [0, 1, 2, 3, 9, 10, 11])
def test_a_timm_model_has_the_classes_in_the_order_of_timms_reader(numbered, tmp_path, index):
    model, reader = always(index), timm.data.create_dataset("", str(numbered))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    labels = torch.tensor([label for _, label in reader.reader.samples])  # without opening a file
    (row,) = run(
        tmp_path, model=f"vit_tiny_patch16_224(img_size=32, {MICRO[:-1]}12)", data=str(numbered),
        sizes="32", checkpoint=str(tmp_path / "weights.safetensors"), modes="scale",
    )  # fmt: skip
    assert row.top1 == pytest.approx(100 * (labels == index).double().mean().item())
    assert row.n == len(labels) == 78


@pytest.mark.need("D2")
@pytest.mark.parametrize("index", [2, 10])
def test_weights_that_were_trained_here_have_the_classes_they_were_trained_with(numbered, tmp_path, index):
    """As a run, and as the file in it that a timm model takes."""
    classes = [str(k) for k in sorted(range(12), key=str)]
    spec = dict(model_name="vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=12)
    about = dict(classes=classes, mean=[0.5] * 3, std=[0.25] * 3)
    tensors = {"model": dict(always(index).state_dict())}
    write_checkpoint(tmp_path / "run" / "last", ModelSpec("timm", spec), tensors, grid=None, **about)
    name = f"vit_tiny_patch16_224(img_size=32, {MICRO[:-1]}12)"
    weights = tmp_path / "run" / "last" / "model.safetensors"
    for settings in (dict(model=str(tmp_path / "run")), dict(model=name, checkpoint=str(weights))):
        (row,) = run(tmp_path, data=str(numbered), sizes="32", modes="scale", train_size="32", **settings)
        assert row.top1 == pytest.approx(100 * (int(classes[index]) + 1) / 78)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "needs --model"),
        (dict(model="vit_tiny_patch16_244"), "did you mean 'vit_tiny_patch16_224'"),
        (dict(model="vit_tiny_patch16_224(depth=1"), "is written 'name(num_classes=10)'"),
        (dict(model="vit_tiny_patch16_224(depht=1)"), "unexpected keyword argument 'depht'"),
        (dict(model="vit2dpe_tiny_patch4_32"), "could not make vit2dpe_tiny_patch4_32 with its pretrained weights"),
        (dict(model="levit_128s(num_classes=3)", sizes="160", untrained=True), "does not take 160x160 images"),
        (dict(model="test_resnet", untrained=True), "the model has 1000 classes, the data have 3, among them blue"),
        (dict(model="test_resnet(num_classes=3)", untrained=True, policies="ntk"), "needs a model of ours"),
        (dict(model="test_resnet(num_classes=3)", untrained=True, sizes="64y"), "a size is written 32 or 32x48"),
        (dict(model="test_resnet(num_classes=3)", untrained=True, modes="scail"), "did you mean 'scale'"),
        (dict(model="test_resnet(num_classes=3)", untrained=True, crop=0.0), "crop must be in"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_first(folder, tmp_path, settings, message):
    with pytest.raises((ConfigError, DataError)) as error:
        run(tmp_path, data=str(folder), **settings)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_2_and_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--model", "nothing_at_all", "--data", "digits"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "neither a folder nor a timm model" in said
    assert main(["evaluate", "--model", "test_resnet(num_classes=10)", "--data", "nowhere", "--untrained"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "broken.png").write_bytes(b"no image")
    assert main(["evaluate", "--model", "test_resnet(num_classes=1)", "--data", ".", "--untrained"]) == 2
    assert "cannot read the image" in capsys.readouterr().err
