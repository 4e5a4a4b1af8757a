"""`vit2dpe swap`: from a run or a name of timm to a model with another encoding, resumed to the same bits."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from PIL import Image

from tests.helpers import read_csv
from tests.training.interrupted import Killed, after_updates, die
from vit2dpe import CheckpointError, load_run
from vit2dpe.cli import main
from vit2dpe.data.settings import DataConfig
from vit2dpe.study import SwapConfig, swap
from vit2dpe.study.exchange_table import difference
from vit2dpe.study.rows import read_rows
from vit2dpe.training.checkpoint import read_meta, read_tensors, write_policy
from vit2dpe.training.engine import Trainer
from vit2dpe.training.objectives.images import train
from vit2dpe.training.objectives.masked_images import pretrain
from vit2dpe.training.pretrain_settings import DecoderConfig, PretrainConfig
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig, TrainConfig

DIGITS = DataConfig(name="digits", limit_train=64, limit_test=20)
SMALL = ModelConfig(patch=4, width=16, depth=2, heads=2, mlp_ratio=2.0, position="learned", drop_path=0.1)
OPTIM = OptimConfig(lr=3e-3, epochs=2, batch_size=24)
LOSSES = ("train_loss", "patch_loss", "answer_loss", "test_loss", "test_agreement")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A run on digits of 8x12."""
    run = RunConfig(out=str(tmp_path_factory.mktemp("old") / "run"), device="cpu")
    return train(TrainConfig(model=SMALL, data=replace(DIGITS, size="8x12"), optim=OPTIM, run=run))


def config(old, out, to="rope", **changes):
    run = RunConfig(out=str(out), device="cpu", save_minutes=0)
    given = SwapConfig(
        init=str(old), to=to, data=DIGITS, optim=OPTIM, run=run, sizes="8x12,16x12", measure="8x12,16x24"
    )
    return replace(given, **changes)


@pytest.fixture(scope="module")
def new(old, tmp_path_factory):
    return swap(config(old, tmp_path_factory.mktemp("new") / "run"), "vit2dpe swap --as typed")


def weights(run):
    meta = read_meta(run / "last")
    return {(name, key): v for name in meta["files"] for key, v in read_tensors(run / "last", meta, name).items()}


# What is written --------------------------------------------------------------------------------------------------


def test_a_run_folder_that_everything_reads(old, new, tmp_path, capsys):
    names = {"config.yaml", "env.json", "metrics.csv", "summary.md", "swap.csv", "swap.png", "last"}
    assert names <= {path.name for path in new.iterdir()}
    model, meta = load_run(new), read_meta(new / "last")
    assert meta["classes"] == read_meta(old / "last")["classes"]
    assert (meta["swap"], meta["arguments"]["position"]) == (dict({"from": "learned", "to": "rope"}, images=64), "rope")
    assert set(dict(model.named_parameters())) < set(dict(load_run(old).named_parameters())), "the teacher stays out"
    assert main(["evaluate", "--model", str(new), "--data", "digits", "--limit", "20", "--out", str(tmp_path)]) == 0
    measured = {row.policy: row.value for row in read_rows(tmp_path / "results.csv")}
    written = [row for row in read_rows(new / "swap.csv") if row.metric == "top1" and "recovered" in row.encoding]
    assert {row.policy: row.value for row in written if row.size == (8, 12)} == pytest.approx(measured)
    assert main(["train", "--init", str(new), "--data", "digits", "--smoke", "--out", str(tmp_path / "next")]) == 0
    assert load_run(tmp_path / "next").embed_dim == 16


def test_the_summary_names_command_table_and_intervals(new):
    text = (new / "summary.md").read_text()
    assert "vit2dpe swap --as typed" in text
    assert "| scale | learned (old) | resize | none |" in text
    assert "| scale | rope (recovered) | ntk | none |" in text
    found = re.search(
        r"top1 at 8x12: old ([\d.]+) \(resize\), swapped .* recovered - old [-+.\d]+ \[(.*), (.*)\]", text
    )
    low, high = float(found[2]), float(found[3])
    assert low < high


def test_agreement_is_with_the_old_model_at_its_own_size(old, new):
    rows = [row for row in read_rows(new / "swap.csv") if row.metric == "agreement"]
    at_own = {row.encoding: row.value for row in rows if row.size == (8, 12)}
    assert at_own["learned (old)"] == 100
    assert at_own["rope (recovered)"] == pytest.approx(float(read_csv(new / "metrics.csv")[-1]["test_agreement"]))
    assert {row.policy for row in rows if "swapped" in row.encoding} == {"extrapolate"}
    assert len(rows) == 2 * (2 + 1 + 4), "sizes times policies"


def test_the_card_names_the_old_encoding_and_the_images(new, tmp_path):
    text = load_run(new).save_card(tmp_path).read_text()
    assert "- **Encoding exchanged:** `learned` for `rope`, recovered from 64 images without labels" in text


def test_differences_have_paired_intervals():
    one, other = torch.tensor([1.0] * 90 + [0] * 10), torch.tensor([1.0] * 80 + [0] * 20)
    low, high = difference(one, other)
    assert 3 < low < 10 < high < 18
    same = torch.rand(50)
    assert difference(same + 0.1, same) == pytest.approx((10, 10))


# Where it starts from ---------------------------------------------------------------------------------------------


def test_from_a_hub_folder_of_timm_and_photos_without_classes(tmp_path, capsys):
    """A flat folder of photos: a tenth is measured, by agreement alone."""
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (60 + i, 50), (10 * i, 90, 200 - 9 * i)).save(tmp_path / "photos" / f"{i}.png")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), embed_dim=48, depth=1, num_heads=3)
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    line = f"swap --init {tmp_path / 'theirs'} --to relative --root {tmp_path / 'photos'} --epochs 1 --batch_size 9 "
    line += f"--device cpu --measure 32x48 --out {tmp_path / 'run'}"
    assert main(line.split()) == 0, capsys.readouterr().err
    assert "at 32x48, 48x64, 64x96" in capsys.readouterr().out
    rows = read_rows(tmp_path / "run" / "swap.csv")
    assert len(read_meta(tmp_path / "run" / "last")["classes"]) == 1000
    assert {row.metric for row in rows} == {"agreement"}
    assert {row.n for row in rows} == {2}
    model = load_run(tmp_path / "run")
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(again(images), model(images))
    line = "- **Encoding exchanged:** `learned` for `relative`, recovered from 18 images without labels"
    for one, place in ((model, "run"), (again, "hub")):
        assert line in one.save_card(tmp_path / place).read_text()
    timm.models.save_for_hf(again, tmp_path / "next", safe_serialization=True)
    assert line in timm.create_model(f"local-dir:{tmp_path / 'next'}").save_card(tmp_path / "next").read_text()


def test_of_an_encoder_without_classes(tmp_path):
    model = replace(SMALL, position="sincos", pool="avg", drop_path=0.0)
    decoder, run = DecoderConfig(width=16, depth=1, heads=2), RunConfig(out=str(tmp_path / "mae"), device="cpu")
    pretrain(PretrainConfig(model=model, decoder=decoder, data=DIGITS, optim=OPTIM, run=run, pictures=0))
    out = swap(config(tmp_path / "mae", tmp_path / "run", sizes="16,24", measure="16,24"))
    rows = read_rows(out / "swap.csv")
    assert {row.metric for row in rows} == {"similarity"}
    assert rows[0].value == pytest.approx(100, abs=1e-3)
    assert load_run(out).num_classes == 0


def test_the_policy_that_was_tuned_is_measured_and_goes_with_the_old_encoding(old, tmp_path):
    shutil.copytree(old, tmp_path / "old")
    write_policy(tmp_path / "old" / "last", "resize(mode=bilinear)", "log(power=4)")
    out = swap(config(tmp_path / "old", tmp_path / "run", optim=replace(OPTIM, epochs=1)))
    rows = [row for row in read_rows(out / "swap.csv") if row.metric == "agreement"]
    assert [row.policy for row in rows if "old" in row.encoding] == [
        policy for policy in ("default", "resize", "interpolate") for _ in range(2)
    ]
    assert "default" not in [row.policy for row in rows if "old" not in row.encoding]
    assert "policy" not in read_meta(out / "last").keys() | read_meta(out / "last")["arguments"].keys()


# Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "to"), [(1, "rope"), (4, "relative")])
def test_a_killed_swap_goes_on_to_the_same_bits(old, new, tmp_path, at, to):
    new = new if to == "rope" else swap(config(old, tmp_path / "whole", to))
    tmp_path, given = tmp_path / "stopped", config(old, tmp_path / "stopped", to)
    with after_updates({at: Trainer.save, at + 1: die}), pytest.raises(Killed):
        swap(given)
    torch.manual_seed(99)
    swap(replace(given, resume=True))
    one, other = weights(new), weights(tmp_path)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert (new / "swap.csv").read_text() == (tmp_path / "swap.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_swap_learns_the_same(backend, old, new, tmp_path, monkeypatch):
    torch.compiler.reset()
    used, compiled = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda net: used.append(net) or partial(compiled, fullgraph=True, backend=backend)(net)
    )
    given = config(old, tmp_path / "run")
    swap(replace(given, run=replace(given.run, compile=True)))
    assert len(used) == 1
    one, two = (read_csv(run / "metrics.csv") for run in (new, tmp_path / "run"))
    for a, b in zip(one, two, strict=True):
        assert [float(b[name]) for name in LOSSES] == pytest.approx([float(a[name]) for name in LOSSES], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_recover_as_one_does(old, new, tmp_path, how):
    line = f"swap --init {old} --to rope --data digits --limit_train 64 --limit_test 20 --lr 3e-3 --epochs 2"
    line += f" --batch_size 24 --device cpu --sizes 8x12,16x12 --measure 8x12,16x24 --parallel {how}"
    line += f" --out {tmp_path / 'run'}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vit2dpe"]
    done = subprocess.run([*command, *line.split()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_csv(run / "metrics.csv") for run in (new, tmp_path / "run"))
    for a, b in zip(one, two, strict=True):
        assert [float(a[name]) for name in LOSSES] == pytest.approx([float(b[name]) for name in LOSSES], abs=1e-5)
    rows = [read_rows(run / "swap.csv") for run in (new, tmp_path / "run")]
    assert [row.value for row in rows[0]] == pytest.approx([row.value for row in rows[1]], abs=5.1), (
        "an image of twenty"
    )


def test_another_old_model_is_refused_when_it_goes_on(old, new, tmp_path):
    again = TrainConfig(model=SMALL, data=replace(DIGITS, size="8x12"), optim=replace(OPTIM, epochs=1),
                        run=RunConfig(out=str(tmp_path / "other"), device="cpu", seed=1))  # fmt: skip
    with pytest.raises(CheckpointError, match="learns from another model"):
        swap(config(train(again), new, resume=True))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--data.name="], "needs images"),
        (["--data.name=", "--root", "nowhere"], "no folder nowhere"),
        (["--to", "roep"], "did you mean 'rope'"),
        (["--to", "learned"], "is learned already"),
        (["--to", "rope(base=0)"], "base"),
        (["--sizes", "8x12,10"], "must be a multiple of the patch"),
        (["--measure", "9"], "must be a multiple of the patch"),
        (["--data.size", "8x12"], "that of the old model"),
        (["--init", "vit_tinny_patch16_224"], "did you mean"),
        (["--optim.epochs", "0"], "at least 1"),
        (["--to="], "--to, the other encoding"),
    ],
)
def test_what_cannot_be_is_one_line(old, tmp_path, capsys, words, why):
    line = ["swap", "--init", str(old), "--to", "rope", "--data.name", "digits", "--run.out", str(tmp_path / "run")]
    assert main([*line, *words]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


def test_config_yaml_gives_the_same_swap_again(old, new):
    import yaml

    kept = yaml.safe_load((new / "config.yaml").read_text())
    assert (kept["to"], kept["sizes"], kept["measure"]) == ("rope", "8x12,16x12", "8x12,16x24")
    assert json.loads((new / "env.json").read_text())["images"].startswith("train 64 of")
