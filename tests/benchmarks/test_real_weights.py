"""Trained weights at other sizes: the dry run goes through, goes on, and its table says what stands open."""

import json

import pytest
import timm
import torch

from benchmarks import real_weights
from benchmarks.measure import resident_bytes
from benchmarks.real_weights import OPEN, SIX, main, markdown
from tests.data.pictures import photos
from tests.helpers import randn, shaken
from vit2dpe import from_timm
from vit2dpe.models.timm_api import TimmModel
from vit2dpe.training.start import describe

CHEAP = ("deit3", "vit_small_patch14_dinov2")  # with a classifier and without
EACH = [
    pytest.param(of.name, marks=[] if of.name.startswith(CHEAP) else pytest.mark.slow, id=of.name.partition(".")[0])
    for of in SIX
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    photos(root / "train", each=6)
    photos(root / "val", each=2)
    return root


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EACH)
def test_a_dry_run(name, images, tmp_path, monkeypatch, capsys):
    factors = real_weights.FACTORS if name.startswith("swin") else (1.0, 2.0)
    monkeypatch.setattr(real_weights, "FACTORS", factors)
    command = ["--root", images, "--out", tmp_path, "--random", "--names", name, "--batch", 9]
    command = [*map(str, command)]
    assert main([*command, "--seconds", "0"]) == 0
    assert not (tmp_path / "rows.jsonl").exists(), "past the deadline nothing begins"
    assert main(command) == 0
    said, rows = capsys.readouterr().out, {row["row"].removeprefix(f"{name} "): row for row in rows_of(tmp_path)}
    assert rows["model"]["apart"] < 1e-5
    at = [f"{factor:g}x" for factor in factors]
    assert set(rows) == {"about", "model", "swap"} | {
        f"{what}{by}" for what in ("", "tune ", "swap ", "speed ") for by in at if (what, by) != ("tune ", "1x")
    }
    own, wide = rows["1x"], rows["2x"]
    assert [2 * int(side) for side in own["size"].split("x")] == [int(side) for side in wide["size"].split("x")]
    assert {value for row in (own, wide) for key, value in row["top1"].items() if key == "images"} == {6}
    assert rows["swap"]["images"] == 18
    assert rows["speed 2x"]["peak_MiB"] > 0 < rows["speed 2x"]["images_per_s"]
    if rows["model"]["classes"]:
        assert own["timm"] == own["top1"]
        assert rows["tune 2x"]["top1"]["images"] == 6
    else:
        assert "no classes" in rows["tune 2x"]["open"]
    line = next(line for line in said.splitlines() if line.startswith(f"| `{name}` | 2x"))
    assert OPEN not in line
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before, "what is there is not measured again"


@pytest.mark.parametrize("of", SIX, ids=lambda of: of.name.partition(".")[0])
def test_every_name_has_weights_and_an_encoding_that_can_be_exchanged(of):
    """On the meta device, fewer blocks, timm's own size: nothing is downloaded."""
    fewer = {argument: value for argument, value in of.small.items() if argument not in ("img_size", "window_size")}
    start = describe(f"{of.name}({', '.join(f'{argument}={value!r}' for argument, value in fewer.items())})")
    assert start.position not in (None, of.to)
    assert start.changed(of.to).arguments["position"].startswith(of.to)
    assert start.size == tuple(timm.get_pretrained_cfg(of.name).input_size[1:])
    assert start.mean is not None


@pytest.mark.slow
@pytest.mark.parametrize("of", SIX, ids=lambda of: of.name.partition(".")[0])
@torch.inference_mode()
def test_ours_is_timms_model_at_its_own_size(of):
    torch.manual_seed(0)
    theirs = shaken(timm.create_model(of.name, pretrained=False)).eval()
    ours = from_timm(theirs).eval()
    assert isinstance(ours, TimmModel)
    x = randn(1, 3, *theirs.pretrained_cfg["input_size"][1:])
    wanted = theirs(x)
    torch.testing.assert_close(ours(x), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_an_error_is_a_row_and_the_rest_of_that_name_waits(images, tmp_path, monkeypatch):
    monkeypatch.setattr(real_weights, "from_timm", lambda model: (_ for _ in ()).throw(RuntimeError("no | network")))
    assert main(["--root", str(images), "--out", str(tmp_path), "--random", "--names", "vit_small_patch16_224"]) == 1
    assert [row["row"] for row in rows_of(tmp_path)] == ["about", f"{SIX[0].name} model"]
    with pytest.raises(SystemExit):
        main(["--root", str(images / "train"), "--random"])


def test_the_table_tells_what_was_measured_and_what_stands_open(tmp_path):
    name = SIX[3].name
    rows = [
        {"row": f"{name} 1x", "size": "336x336", "top1": {"default": 85.5, "images": 50000}},
        {"row": f"{name} 2x", "top1": {"default": 80.0, "interpolate, log": 82.25, "images": 50000}},
        {"row": f"{name} tune 2x", "helps": True, "policy": "ntk", "temperature": "log", "top1": {"default": 82.0}},
        {"row": f"{name} tune 3x", "failed": "OutOfMemoryError: a | b"},
        {"row": f"{name} swap 2x", "top1": {"default": 81.0}},
        {"row": f"{name} speed 2x", "images_per_s": 100.04, "peak_MiB": 512.0},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = markdown(tmp_path / "rows.jsonl").splitlines()
    assert len(lines) == 2 + 5 + 4
    assert lines[2].startswith(f"| `{SIX[0].name}` | 1x, 1.5x, 2x, 3x | {OPEN} |")
    assert lines[5] == f"| `{name}` | 1x | 85.5 |  |  | {OPEN} | {OPEN} | {OPEN} | 50000 |"
    wanted = f"| `{name}` | 2x | 80.0 | 82.2 (`interpolate, log`) | 82.0 (`ntk, log`) | 81.0 (`rope`) | 100.0 | 512.0 |"
    assert lines[7].startswith(wanted)
    assert "OutOfMemoryError: a / b" in lines[8]
    assert len({line.count("|") for line in lines}) == 1
    assert all(OPEN in line for line in markdown(tmp_path / "none.jsonl").splitlines()[2:])


def test_the_peak_is_that_of_the_run():
    kept = resident_bytes(lambda: None)
    if kept is None:
        pytest.skip("this system has no /proc/self/clear_refs")
    assert 190 < (resident_bytes(lambda: torch.ones(200, 2**18).sum()) - kept) / 2**20 < 260
    assert abs(resident_bytes(lambda: None) - kept) < 60 * 2**20, "not of an earlier one"
