"""`vit2dpe predict` and `load_run(...).predict`: what is measured is what is answered, for images and for lines."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from tests.helpers import shaken
from vit2dpe import ConfigError, DataError, load_run
from vit2dpe.cli import main
from vit2dpe.data.native import native_size
from vit2dpe.data.tokenizers import Characters
from vit2dpe.models.spec import ModelSpec
from vit2dpe.study import EvaluateConfig, evaluate_model, read_predictions
from vit2dpe.training.checkpoint import save_model

pytestmark = pytest.mark.need("D19")
ARGUMENTS = dict(position="rope", patch_size=8, embed_dim=48, depth=2, num_heads=3)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NAMES = ["cat", "dog", "newt"]


def run_of(folder: Path, size: tuple[int, int] = (32, 40), **about: object) -> Path:
    """The folder of a run of three classes, of a ViT or a Swin with random weights."""
    about = dict(task="classification", data="folder", classes=NAMES, mean=MEAN, std=STD) | about
    spec = ModelSpec("ViT", ARGUMENTS | dict(img_size=list(size), in_chans=len(about["mean"]), num_classes=3))
    save_model(folder / "last", shaken(spec.build(), 0.2), spec.arguments, **about)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Noise of many sizes and aspects, one in grey, in three class folders."""
    draws = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = draws.integers(0, 255, (5 + 20 * i, 30 + 40 * label, 3), np.uint8)
            image = Image.fromarray(pixels).convert("L" if (label, i) == (1, 1) else "RGB")
            image.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def by_hand(model: nn.Module, path: Path, size: tuple[int, int]) -> Tensor:
    """Probabilities of one image: decode, fit, normalize, model."""
    rgb = ImageOps.fit(Image.open(path).convert("RGB"), size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        return model((pixels - mean) / std).double().softmax(-1)[0]


def test_the_answer_is_that_of_decoding_resizing_normalizing_by_hand(run: Path, images: Path) -> None:
    model = load_run(run)
    for path in files_of(images):
        expected = by_hand(model, path, (32, 40)).sort(descending=True)
        found = model.predict(path)
        assert found.probabilities == tuple(expected.values.tolist())
        assert found.classes == tuple(NAMES[i] for i in expected.indices.tolist())


def test_paths_images_arrays_and_lists_give_one_answer(run: Path, images: Path) -> None:
    model = load_run(run).train()
    path = files_of(images)[2]
    opened = Image.open(path)
    pixels = np.array(opened)
    expected = model.predict(path, k=2)
    assert len(expected.classes) == 2
    assert model.training
    for image in (str(path), opened, pixels, torch.from_numpy(pixels)):
        assert model.predict(image, k=2) == expected
        assert model.predict([image], k=2) == [expected]
    several = model.predict(files_of(images), batch_size=2)
    assert [found.classes for found in several] == [model.predict(file).classes for file in files_of(images)]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3)), "uint8 .height, width, 3.*got float64"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "got uint8 .3, 8, 8."),
        (7, "got int"),
        ("nowhere.png", "cannot read the image nowhere.png"),
    ],
)
def test_what_is_no_image(run: Path, image: object, words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        load_run(run).predict(image if isinstance(image, str) else [image])


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_top_1_is_the_number_of_evaluate(tmp_path: Path, images: Path, fit: str) -> None:
    run = run_of(tmp_path / "run", **({} if fit == "crop" else {"fit": fit}))
    config = dict(model=str(run), data=str(images), policies="default", out=str(tmp_path / "out"))
    (row,) = evaluate_model(EvaluateConfig(fit=fit, **config))
    files = files_of(images)
    found = load_run(run).predict(files)
    right = [one.classes[0] == file.parent.name for one, file in zip(found, files, strict=True)]
    assert row.top1 == pytest.approx(100 * sum(right) / len(files))
    certain = [dict(zip(*one, strict=True))[file.parent.name] for one, file in zip(found, files, strict=True)]
    assert row.loss == pytest.approx(-np.mean(np.log(certain)), rel=1e-5)


def test_native_pictures_are_what_each_is_at_its_own_size(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Several in one batch; 20 patches are as many as the model's own size has."""
    model, files = load_run(run), files_of(images)
    found = model.predict(files, fit="native")
    for path, answer in zip(files, found, strict=True):
        rgb = Image.open(path).convert("RGB")
        height, width = native_size((rgb.height, rgb.width), (8, 8), 20)
        resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        with torch.inference_mode():
            expected = model((pixels - mean) / std).double().softmax(-1)[0].sort(descending=True)
        torch.testing.assert_close(torch.tensor(answer.probabilities), expected.values.float(), atol=1e-6, rtol=1e-5)
    out = tmp_path / "native.csv"
    assert main(["predict", str(run), str(images), "--fit", "native", "--max-tokens", "20", "--out", str(out)]) in (
        0,
        None,
    )
    probabilities = [row.prediction.probabilities for row in read_predictions(out)]
    torch.testing.assert_close(torch.tensor(probabilities), torch.tensor([a.probabilities for a in found]))
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(max_tokens=9), "max_tokens 9 is of fit='native'"),
        (dict(fit="native", size=(16, 16)), "leave size and spacing out"),
        (dict(fit="natve"), "unknown fit 'natve'; did you mean 'native'"),
    ],
)
def test_native_goes_with_nothing_that_names_a_size(run: Path, given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_run(run).predict(np.zeros((8, 8, 3), np.uint8), **given)


@pytest.mark.parametrize("size", ["16", "48x64"])
def test_another_size_is_that_of_evaluate(tmp_path: Path, run: Path, images: Path, size: str) -> None:
    config = dict(model=str(run), data=str(images), sizes=size, policies="ntk", out=str(tmp_path / "out"))
    (row,) = evaluate_model(EvaluateConfig(**config))
    out = tmp_path / "found.csv"
    assert main(["predict", str(run), str(images), "--size", size, "--policy", "ntk", "--out", str(out)]) == 0
    certain = [dict(zip(*one.prediction, strict=True))[Path(one.path).parent.name] for one in read_predictions(out)]
    assert row.loss == pytest.approx(-np.mean(np.log(certain)), rel=1e-5)


def test_a_run_on_digits_answers_as_it_is_measured(tmp_path: Path) -> None:
    mean, std, classes = 0.3, 0.375, [str(i) for i in range(10)]
    spec = ModelSpec("ViT", ARGUMENTS | dict(img_size=32, in_chans=1, num_classes=10))
    about = dict(task="classification", data="digits", classes=classes, mean=[mean], std=[std])
    save_model(tmp_path / "run" / "last", shaken(spec.build(), 0.2), spec.arguments, **about)
    pixels = torch.randint(0, 256, (9, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = load_run(tmp_path / "run")
    images = F.interpolate((pixels[:, None] / 255 - mean) / std, (32, 32), mode="bicubic", antialias=True)
    with torch.inference_mode():
        expected = model(images).double().softmax(-1).max(-1)
    found = model.predict([image.numpy() for image in pixels])
    assert [one.classes[0] for one in found] == [classes[i] for i in expected.indices.tolist()]
    assert [one.probabilities[0] for one in found] == pytest.approx(expected.values.tolist(), rel=1e-6)


def test_the_command_prints_a_line_an_image_and_writes_a_table(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = files_of(images)[0], tmp_path / "predictions.csv"
    words = ["predict", str(run), str(first), str(images), "--top", "2", "--batch-size", "4", "--out", str(out)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    best = load_run(run).predict(first, k=2)
    assert lines[0] == f"{first}: " + ", ".join(f"{name} {p:.4f}" for name, p in zip(*best, strict=True))
    found = read_predictions(out)
    assert [one.path for one in found] == [str(first), *map(str, files_of(images))]
    expected = load_run(run).predict([first, *files_of(images)], k=2, batch_size=4)
    assert [one.prediction for one in found] == expected
    assert out.read_text().splitlines()[0] == "path,class_1,probability_1,class_2,probability_2"


def test_unreadable_files_stop_it_or_are_counted(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (images / "cat" / "broken.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(run), str(images)]) == 2
    assert "cannot read the image" in capsys.readouterr().err
    assert main(["predict", str(run), str(images), "--unreadable", "skip"]) == 0
    told = capsys.readouterr().out
    assert "left out because they cannot be read: 1 of 10" in told
    assert sum(": " in line and "note" not in line for line in told.splitlines()) == 9
    for words, said in [
        ([str(run)], "predict needs a model and images"),
        ([str(run), str(images / "cat" / "broken.png"), "--unreadable", "skip"], "none of 1 could be read"),
        ([str(run), str(tmp_path / "empty")], "holds no image"),
        ([str(run), "nowhere"], "no file or folder nowhere"),
        ([str(run), str(images), "--policy", "ntkk"], "ntk"),
        ([str(run), str(images), "--top", "0"], "top must be at least 1"),
        ([str(run), str(images), "--size", "33"], "33"),
    ]:
        assert main(["predict", *words]) == 2, words
        assert said in capsys.readouterr().err


def test_a_model_of_timm_and_a_hub_folder_with_names_of_its_own(images: Path, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3, num_classes=3)
    save_for_hf(shaken(model, 0.2), tmp_path / "hub", model_config=dict(label_names=NAMES), safe_serialization=True)
    out = tmp_path / "found.csv"
    file = files_of(images)[5]
    assert main(["predict", str(tmp_path / "hub"), str(file), "--size", "32", "--out", str(out)]) == 0
    (found,) = read_predictions(out)
    assert set(found.prediction.classes) == set(NAMES)
    side = round(32 / model.pretrained_cfg["crop_pct"])
    rgb = ImageOps.fit(Image.open(file).convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    pixels = (torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    kept = round(side * model.pretrained_cfg["crop_pct"])
    start = (side - kept) // 2
    images_ = F.interpolate(
        pixels[..., start : start + kept, start : start + kept], (32, 32), mode="bicubic", antialias=True
    )
    with torch.inference_mode():
        expected = model(images_).double().softmax(-1).max()
    assert found.prediction.probabilities[0] == pytest.approx(float(expected), rel=1e-5)


def test_lines_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Characters("abc ")
    arguments = dict(vocab_size=4, context=6, embed_dim=48, depth=1, num_heads=3, num_classes=2, position="rope")
    spec = ModelSpec("TextEncoder", arguments)
    about = dict(task="text classification", data="lines", classes=["x", "y"], tokenizer=tokenizer.describe())
    save_model(tmp_path / "run" / "last", shaken(spec.build(), 0.2), arguments, **about)
    model = load_run(tmp_path / "run")
    lines = ["abc", "a cab", "bbbbbbbbbb"]
    with torch.inference_mode():
        expected = [
            model(torch.tensor([tokenizer.encode(line)[:6]])).double().softmax(-1).max().item() for line in lines
        ]
    assert [one.probabilities[0] for one in model.predict(lines)] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n\n")
    out = tmp_path / "found.csv"
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "lines.txt"), "--out", str(out)]) == 0
    assert [one.path for one in read_predictions(out)] == lines
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nzzz\n"))
    assert main(["predict", str(tmp_path / "run"), "-", "--unreadable", "skip"]) == 0
    told = capsys.readouterr().out
    assert "abc: " in told
    assert "left out because they cannot be read: 1 of 2" in told
    with pytest.raises(DataError, match="empty"):
        model.predict("")
