"""`vit2dpe tune`: the choice goes where the model is read from, and everything that reads the model follows it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from tests.helpers import read_csv
from vit2dpe import ViT, load_run
from vit2dpe.cli import main
from vit2dpe.models.card import save_card
from vit2dpe.models.timm_api import recorded_policies
from vit2dpe.resolution.tuning import Gain, Tuned, TuneRow
from vit2dpe.study import EvaluateConfig, TuneConfig, evaluate_model, tune_model
from vit2dpe.testing import randomise
from vit2dpe.training.checkpoint import read_meta, save_model
from vit2dpe.training.objectives.images import start_of
from vit2dpe.training.settings import RunConfig, TrainConfig

MODEL = dict(position="rope", img_size=(32, 48), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2)
POLICY, TEMPERATURE = "interpolate(power=0.5)", "log(power=2)"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (40 + i, 60, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = randomise(ViT(**MODEL))
    about = dict(classes=["a", "b"], mean=[0.5] * 3, std=[0.25] * 3, fit="squash")
    save_model(tmp_path / "run" / "last", model, MODEL, **about)
    (tmp_path / "run" / "summary.md").write_text("# a run\n")
    return tmp_path / "run"


@pytest.fixture
def found(monkeypatch):
    """What helps, whatever the images."""
    rows = [
        TuneRow(*words, "told from", kl, 50.0, 6)
        for words, kl in [(("default", "none"), 2.0), ((POLICY, TEMPERATURE), 1.0)]
    ]
    gain = Gain(1.0, 0.5, 1.5)
    tuned = Tuned((64, 48), POLICY, TEMPERATURE, True, gain, gain, rows)
    monkeypatch.setattr("vit2dpe.study.tuning.tune", lambda *args, **kwargs: tuned)
    return tuned


def command(*words):
    return main(["tune", *map(str, words)])


def test_the_choice_is_kept_in_the_run_and_everything_that_reads_it_follows(run, images, found, capsys, tmp_path):
    before = read_meta(run / "last")
    assert command("--init", run, "--root", images, "--size", "64x48") == 0
    said = capsys.readouterr().out
    assert f"chosen: {POLICY} with temperature {TEMPERATURE}, 1.0000 (0.5000 to 1.5000) nats closer" in said
    meta = read_meta(run / "last")
    assert meta["policy"] == dict(policy=POLICY, temperature=TEMPERATURE)
    same = ("policy", "check")
    assert {k: v for k, v in meta.items() if k not in same} == {k: v for k, v in before.items() if k not in same}
    model = load_run(run)
    assert recorded_policies(model) == [(POLICY, TEMPERATURE)]
    summary = (run / "summary.md").read_text()
    assert command("--init", run, "--root", images, "--size", "64x48") == 0
    assert summary.startswith("# a run\n")
    assert summary.count("## At other sizes") == 1
    assert POLICY in summary
    assert (run / "summary.md").read_text() == summary, "a second time it is replaced"

    rows = evaluate_model(EvaluateConfig(model=str(run), data=str(images), sizes="64x48", out=str(tmp_path / "out")))
    by_policy = {row.policy: row.loss for row in rows}
    assert next(iter(by_policy)) == "default"
    assert by_policy["default"] != by_policy["extrapolate"]
    again = evaluate_model(
        EvaluateConfig(
            model=str(run),
            data=str(images),
            sizes="64x48",
            policies=POLICY,
            temperatures=TEMPERATURE,
            out=str(tmp_path / "o"),
        )
    )
    assert again[0].loss == by_policy["default"]


def test_a_run_that_is_trained_further_is_not_refused(run, images, found):
    """The arguments that a resumed training compares are those that it began with."""
    before = read_meta(run / "last")["arguments"]
    assert command("--init", run, "--root", images, "--size", "64x48") == 0
    assert read_meta(run / "last")["arguments"] == before
    goes_on = TrainConfig(init=str(run), run=RunConfig(out=str(run)), resume=True)
    assert start_of(goes_on).changed().arguments == before
    assert start_of(replace(goes_on, resume=False)).changed().arguments["policy"] == POLICY


@pytest.mark.parametrize("name", ["vit2dpe_tiny_patch8_64", "vit2dpe_from_timm"])
def test_the_choice_is_kept_in_a_hub_folder_and_its_card(name, images, found, tmp_path):
    base = dict(base="vit_tiny_patch16_224") if name == "vit2dpe_from_timm" else {}
    model, folder = timm.create_model(name, **base, **MODEL), tmp_path / "hub"
    save_for_hf(model, str(folder), safe_serialization=True)
    save_card(model, folder, data="mine")
    assert command("--init", folder, "--root", images, "--size", "64x48") == 0
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert recorded_policies(again)[-1] == (POLICY, TEMPERATURE)
    card = (folder / "README.md").read_text()
    assert f"divides, `{POLICY}` with temperature `{TEMPERATURE}`" in card
    assert "**Data:** mine" in card
    assert recorded_policies(again) == [(POLICY, TEMPERATURE)]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit2dpe_tiny_patch8_64"])
def test_the_model_of_a_name_goes_to_a_folder_of_its_own(name, images, found, tmp_path, monkeypatch):
    if name == "vit_tiny_patch16_224":
        kept = Tuned(found.size, "resize(mode=plain)", "log", *found[3:])
        monkeypatch.setattr("vit2dpe.study.tuning.tune", lambda *args, **kwargs: kept)
    sizes = "img_size=(32, 48), patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=2"
    position = "" if name == "vit_tiny_patch16_224" else "position=rope, "
    words = ["--init", f"{name}({position}{sizes})", "--untrained", "--root", images, "--size", "64x48"]
    assert command(*words, "--out", tmp_path / "out") == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert len(recorded_policies(again)) == 1
    assert "with temperature" in (tmp_path / "out" / "README.md").read_text()


def test_a_file_of_weights_goes_to_a_folder_and_the_tensors_of_a_run_are_the_run(run, images, found, tmp_path):
    shutil.copytree(run / "last", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "other" / "mine.safetensors")
    words = ["--root", images, "--size", "64x48", "--out", tmp_path / "out"]
    assert command("--init", tmp_path / "other" / "mine.safetensors", *words) == 0
    again = load_run(tmp_path / "out")
    assert recorded_policies(again) == [(POLICY, TEMPERATURE)]
    assert vars(again)["about"]["classes"] == ["a", "b"]
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again(x), load_run(run)(x))
    assert command("--init", run / "last" / "model.safetensors", *words) == 0
    assert read_meta(run / "last")["policy"]["policy"] == POLICY


def test_the_table_has_what_was_tried_and_without_help_nothing_is_written(run, images, capsys):
    before = (run / "last" / "model.json").read_bytes()
    found = tune_model(TuneConfig(init=str(run), root=str(images), size="64x48", limit=8, fit="crop"))
    rows = read_csv(run / "tune.csv")
    assert [row["policy"] for row in rows] == [row.policy for row in found.rows]
    assert {row["half"]: row["n"] for row in rows} == {"chosen on": "4", "told from": "4"}
    assert all((row["height"], row["width"]) == ("64", "48") for row in rows)
    said = capsys.readouterr().out
    assert "images: 8, half of them to choose on" in said
    assert ("nothing helps" in said) == (not found.helps)
    assert found.helps or (run / "last" / "model.json").read_bytes() == before


def test_a_file_that_cannot_be_read(run, images, found, capsys):
    (images / "a" / "0.png").write_bytes(b"\x89PNG no")
    assert command("--init", run, "--root", images, "--size", "64x48") == 2
    assert "0.png" in capsys.readouterr().err
    assert command("--init", run, "--root", images, "--size", "64x48", "--unreadable", "skip") == 0
    assert "images: 11" in (said := capsys.readouterr().out)
    assert "cannot be read: 1;" in said


def test_a_run_in_use_is_left_alone(run, images, found, capsys):
    from vit2dpe.training.run_folder import run_folder

    before = (run / "last" / "model.json").read_bytes()
    with run_folder(run, resume=True):
        assert command("--init", run, "--root", images, "--size", "64x48") == 2
    assert "is in use" in capsys.readouterr().err
    assert (run / "last" / "model.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "tune needs --init"),
        ({"--size": "60x48"}, "does not take 60x48 images"),
        ({"--size": "32x48"}, "is the model's own size"),
        ({"--root": "nowhere"}, "there is no file or folder nowhere"),
        ({"--root": "empty"}, "holds no image"),
        ({"--limit": "4"}, "at least 8 images, got 4"),
        ({"--fit": "stretch"}, "stretch"),
        ({"--unreadable": "perhaps"}, "perhaps"),
        ({"--init": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"--init": "resnet18(num_classes=2)", "--untrained": "true"}, "ResNet takes no policy"),
        ({"--init": "none"}, "nothing to tune"),
    ],
)
def test_what_cannot_work_is_one_line(words, message, run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    save_model(Path("none"), ViT(**MODEL | dict(position="none")), MODEL | dict(position="none"),
               classes=["a", "b"], mean=[0.5] * 3, std=[0.25] * 3)  # fmt: skip
    given = {"--init": run, "--root": images, "--size": "64x48", **words} if words else {}
    assert command(*[word for pair in given.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
