"""F35 to F47: checkpoints that were cut, altered, made to hurt, or made for another model."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.helpers import seal
from vit2dpe import ViT, load_run
from vit2dpe.cli import main
from vit2dpe.data.datasets import load_images
from vit2dpe.errors import CheckpointError, DataError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.training.checkpoint import save_model, write_checkpoint
from vit2dpe.training.initial_weights import load_weights, read_weights

fault = pytest.mark.fault
ARGUMENTS = dict(
    position="learned+rope_mixed", img_size=(8, 12), patch_size=4, in_chans=1, num_classes=3, embed_dim=8, depth=1,
    num_heads=2, class_token=False, global_pool="avg",
)  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden"


def vit(**changes):
    return ViT(**ARGUMENTS | changes)


@pytest.fixture
def run(tmp_path):
    save_model(tmp_path / "last", vit(), ARGUMENTS, classes=["a", "b", "c"])
    return tmp_path


def refused(run, name, match=None):
    with pytest.raises(CheckpointError, match=match) as caught:
        load_run(run)
    assert name in str(caught.value)
    with pytest.raises(CheckpointError):
        load_weights(vit(), run)


@fault("F35", "F36")
@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_cut_short(run, name):
    path = run / "last" / name
    data = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(data[: len(data) * sixteenth // 16])
        refused(run, name)


@fault("F37")
def test_one_byte(run):
    for name, places in (("model.safetensors", 256), ("model.json", 10**6)):
        path = run / "last" / name
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // places)):
            bad = bytearray(data)
            bad[place] ^= 1
            path.write_bytes(bad)
            try:
                same = json.loads(bad) == json.loads(data) if name == "model.json" else False
            except ValueError:
                same = False
            if not same:  # a space for another says the same
                with pytest.raises(CheckpointError, match="last"):
                    load_run(run)
        path.write_bytes(data)
        load_run(run)


@fault("F38", "F39")
def test_another_architecture(run):
    with pytest.raises(
        CheckpointError, match=r"another architecture: \d+ of \d+ tensors.*\(8, 1, 4, 4\) for \(16, 1, 4, 4\)"
    ):
        load_weights(vit(embed_dim=16), run)
    with pytest.raises(CheckpointError, match=r"missing: blocks\.1\S*, .* and \d+ more; unexpected: none"):
        load_weights(vit(depth=4), run)


@fault("F40")
def test_other_shapes_are_resized_told_or_refused(run):
    loaded = load_weights(vit(num_classes=7), run)
    assert loaded.left == ["head.weight", "head.bias"]
    assert "drawn anew: head.weight, head.bias" in str(loaded)
    assert not load_weights(vit(img_size=(16, 20)), run).left


@fault("F41")
def test_older_and_newer_formats(run):
    old = load_run(GOLDEN / "format1")
    x = torch.linspace(-1, 1, 96).view(1, 1, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(old(x), torch.tensor(old.about["logits"]), atol=1e-6, rtol=0)
    path = run / "last/model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    refused(run, "last", "format 99.*upgrade")


class Payload:
    def __init__(self, call, *args):
        self.what = call, args

    def __reduce__(self):
        return self.what


def payloads(sentinel):
    yield "os.mkdir", Payload(os.mkdir, sentinel)
    yield "os.system", Payload(os.system, f"mkdir {sentinel}")
    yield "eval", Payload(eval, f"__import__('os').mkdir({sentinel!r})")
    yield "exec", Payload(exec, f"__import__('os').mkdir({sentinel!r})")
    yield "nested", {"state_dict": {"w": torch.zeros(1)}, "optimizer": {"state": [Payload(os.mkdir, sentinel)]}}


@fault("F42")
@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "safetensors", "ckpt"])
def test_pickles_are_not_executed(tmp_path, ending, capsys):
    sentinel = str(tmp_path / "executed")
    path = tmp_path / f"w.{ending}"
    for _, payload in payloads(sentinel):
        torch.save(payload, path)
        contents = [path.read_bytes(), pickle.dumps(payload)]
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=f"w.{ending}"):
                read_weights(path)
            assert not os.path.exists(sentinel)
    assert main(["train", "--init", str(path), "--smoke", "--run.out", str(tmp_path / "out")]) == 2
    assert f"w.{ending}" in capsys.readouterr().err
    assert not os.path.exists(sentinel)


@fault("F42")
def test_pickles_in_the_place_of_our_files(run):
    sentinel = str(run / "executed")
    for name in ("model.safetensors", "model.json"):
        before = (run / "last" / name).read_bytes()
        (run / "last" / name).write_bytes(pickle.dumps(Payload(os.mkdir, sentinel)))
        refused(run, name)
        (run / "last" / name).write_bytes(before)
    archive = run / "scripted.pth"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload(os.mkdir, sentinel)))
        file.writestr("archive/code/__torch__.py", "boom")
    with pytest.raises(CheckpointError, match=r"scripted\.pth"):
        read_weights(archive)
    assert not os.path.exists(sentinel)


def safetensors(header, body=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@fault("F43")
@pytest.mark.parametrize(
    "content",
    [
        (10**18).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little"),
        safetensors({"a": entry(0, 8), "b": entry(4, 12)}),
        safetensors({"a": entry(0, 4, (1,)), "b": entry(8, 16)}),
        safetensors({"a": entry(0, 8, (2**63,))}),
        safetensors({"a": entry(0, 8, (3,))}),
        safetensors({"a": entry(8, 0)}),
        safetensors({"a": entry(0, 10**15)}),
        safetensors({"a": entry(0, 8, dtype="F99")}),
        safetensors(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}'),
        safetensors(b"\xff\xfe not json"),
        safetensors(b"[" * 50_000),
        b"\x01",
        b"",
    ],
    ids=range(14),
)
def test_hostile_safetensors(run, content):
    path = run / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_weights(path)


@fault("F43")
def test_hostile_json(run):
    for text in (
        "[]",
        "null",
        "[" * 100_000,
        '{"format": 2}',
        '{"format": "x"}',
        '{"format": 1}',
        '{"format": 1, "sha256": 3}',
    ):
        (run / "last/model.json").write_text(text)
        with pytest.raises(CheckpointError, match="last"):
            load_run(run)


@fault("F44")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(run, value):
    model = vit()
    with torch.no_grad():
        model.head.weight[1, 2] = value
    save_model(run / "last", model, ARGUMENTS)
    refused(run, "head.weight", "not finite")
    assert load_run(run, allow_nan=True).head.weight[1, 2].isfinite().item() is False


@fault("F45")
def test_names_that_climb_out(tmp_path, monkeypatch):
    secret = tmp_path / "secret.safetensors"
    write_checkpoint(tmp_path / "run/last", ModelSpec("ViT", ARGUMENTS), {"model": vit().state_dict()})
    secret.write_bytes((tmp_path / "run/last/model.safetensors").read_bytes())
    path = tmp_path / "run/last/model.json"
    for name in ("../../secret", "/etc/passwd", "a/b", ""):
        meta = json.loads(path.read_text())
        meta["files"] = {"model": meta["sha256"], name: meta["sha256"]}
        path.write_text(json.dumps(seal(meta)))
        with pytest.raises(CheckpointError, match="names a file"):
            load_run(tmp_path / "run")
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name in ("a/x.png", "../../../escaped/x.png"):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match=r"cache.*x\.png"):  # read from where it was put, and no image
        load_images("tar", tmp_path)
    assert not list(tmp_path.parent.rglob("escaped/x.png"))


@fault("F46")
def test_another_grid_keeps_rows_and_columns_apart(run):
    model = vit(position="learned")
    rows, columns = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), indexing="ij")
    with torch.no_grad():
        model.position.pos_embed[0, :, :, 0], model.position.pos_embed[0, :, :, 1] = rows, columns
    save_model(run / "last", model, ARGUMENTS | {"position": "learned"})
    wide = vit(position="learned", img_size=(16, 36))  # 4 x 9 = 36 places: a square number
    load_weights(wide, run)
    table = wide.position.pos_embed[0]
    assert table.shape[:2] == (4, 9)
    assert (table[1:, :, 0] > table[:-1, :, 0]).all(), "the first channel grows down the rows"
    assert (table[:, 1:, 1] > table[:, :-1, 1]).all(), "the second along the columns"
    again = vit(position="learned")
    load_weights(again, run)
    assert torch.equal(again.position.pos_embed, model.position.pos_embed)


@fault("F47")
def test_half_precision_there_and_back(run):
    half = vit().bfloat16()
    save_model(run / "last", half, ARGUMENTS)
    full = load_run(run)
    assert full.head.weight.dtype == torch.float32
    back = full.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), back.state_dict().values(), strict=True))
