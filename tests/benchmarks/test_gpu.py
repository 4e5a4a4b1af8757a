"""The run for a GPU goes through on a CPU, small; what its folder holds is not done again, and errors are rows."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, gpu_checks, gpu_speed
from benchmarks.resumable import Rows
from benchmarks.run import bench, plan
from benchmarks.table import markdown
from vit2dpe import ConfigError, Positions
from vit2dpe.attention.kernels import rotary
from vit2dpe.encodings import encodings_of
from vit2dpe.signal import Dense, Distance

ROOT = Path(__file__).parents[2]


def run(out, **settings):
    env = os.environ | dict(DEVICE="cpu", SMALL="1", EPOCHS="1", SEEDS="1", JOBS="1", OMP_NUM_THREADS="1") | settings
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "9", str(out)]
    return subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, timeout=600, check=True)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


NUMBERS = [f"numbers rope {n}{w}" for n in (64, 65) for w in ("", " without triton")]
NUMBERS += [f"numbers relative {n}" for n in (64, 65)]


@pytest.mark.slow
def test_every_stage_leaves_its_results_and_another_run_goes_on_with_them(tmp_path):
    out, again = tmp_path / "gpu", tmp_path / "again"
    stages = "checks speed study"  # what doctor needs is another test's
    done = run(out, STAGES=stages)
    checks = rows_of(out / "checks.jsonl")
    assert [row["row"] for row in checks] == ["about", *NUMBERS]
    assert all(row["right"] for row in checks[1:])
    speed = [
        row for name in ("rope", "learned") for row in json.loads((out / f"speed/{name}.json").read_text())["rows"]
    ]
    assert [row["mode"] for row in speed] == ["inference", "training", "training"]
    assert not [row for row in checks + speed if "failed" in row]
    assert (out / "study/summary.md").is_file(), done.stdout + done.stderr
    with tarfile.open(out / "kept.tar.gz") as kept:
        names = kept.getnames()
    assert {"checks.jsonl", "speed/rope.json", "study/results.csv"} < set(names)
    assert not [name for name in names if "/last/" in name and name.endswith(".safetensors")]
    # As if it had been stopped in all stages: another machine goes on with what was kept alone.
    (out / "study/summary.md").unlink()
    lines = (out / "checks.jsonl").read_text().splitlines(keepends=True)
    (out / "checks.jsonl").write_text("".join(lines[:-1]))
    (out / "speed/learned.json").unlink()
    done = run(out, STAGES="none")
    assert "== done" in done.stdout
    done = run(again, STAGES=stages, KEPT=str(out / "kept.tar.gz"))
    assert (again / "checks.jsonl").read_text().startswith("".join(lines[:-1]))
    assert [row["row"] for row in rows_of(again / "checks.jsonl")] == ["about", *NUMBERS]
    assert (again / "speed/rope.json").read_text() == (out / "speed/rope.json").read_text()
    assert (again / "speed/learned.json").is_file()
    assert done.stdout.count("finished before") == 2
    assert (again / "study/results.csv").read_bytes() == (out / "study/results.csv").read_bytes()


def test_stages_get_their_share_of_the_time_and_what_they_leave_is_kept(tmp_path):
    """With a stand-in for Python, which writes down how it is called."""
    calls, python = tmp_path / "calls", tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n')
    python.chmod(0o755)
    out, other = tmp_path / "gpu", tmp_path / "other"
    (out / "study/cells/rope/last").mkdir(parents=True)
    for name in ("checks.jsonl", "study/cells/rope/sweep-1.csv", "study/cells/rope/last/model.safetensors"):
        (out / name).write_text(name)
    run(out, PATH=f"{python.parent}:{os.environ['PATH']}")
    doctor, checks, speed, study = calls.read_text().splitlines()
    assert "vit2dpe doctor" in doctor
    assert checks.endswith("--seconds 135 --small")  # 150 of 540 s, the last 15 for what has begun
    assert speed.endswith("--seconds 228 --small")  # 45% of them
    assert "vit2dpe study" in study
    with tarfile.open(out / "kept.tar.gz") as kept:
        assert sorted(kept.getnames()) == ["checks.jsonl", "doctor.txt", "study/cells/rope/sweep-1.csv"]
    run(other, STAGES="none", KEPT=str(out / "kept.tar.gz"))
    assert (other / "study/cells/rope/sweep-1.csv").read_text() == "study/cells/rope/sweep-1.csv"
    assert len(calls.read_text().splitlines()) == 4
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "0", str(other)]
    done = subprocess.run(command, env=os.environ | dict(DEVICE="cpu"), capture_output=True, text=True, check=True)
    assert done.stdout.count("left out") == 4


def test_a_row_that_fails_says_why_and_the_next_one_goes_on(tmp_path):
    def fails():
        raise ValueError("no such thing\nand more")

    rows = Rows(tmp_path / "rows.jsonl")
    rows.once("a", fails)
    rows.once("b", lambda: dict(x=1))
    again = Rows(tmp_path / "rows.jsonl")
    again.once("b", fails)
    assert [again.rows[name].get("failed") for name in "ab"] == ["ValueError: no such thing", None]
    assert again.rows["a"]["at"].startswith("test_gpu.py:")
    assert again.rows["b"]["x"] == 1


def test_past_the_deadline_nothing_begins(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", seconds=-1)
    rows.once("a", lambda: pytest.fail("begun"))
    assert rows.left_out == ["a"]
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_wrong_number_is_seen(monkeypatch):
    right = gpu_checks.numbers("rope", False, "cpu")
    assert right["right"]
    assert "rotation" in right["training"]
    original = gpu_checks.loss_of

    def shifted(model, images, *args, **kwargs):  # what is not the reference sees other pixels
        return original(model, images if images.dtype == torch.float64 else images.roll(1, -1), *args, **kwargs)

    monkeypatch.setattr(gpu_checks, "loss_of", shifted)
    assert not gpu_checks.numbers("rope", False, "cpu")["right"]


def test_the_triton_kernel_is_turned_off_and_on_again(monkeypatch):
    seen, original = [], rotary.TRITON
    monkeypatch.setattr(gpu_checks, "_numbers", lambda *args: seen.append(rotary.TRITON))
    for triton in (True, False):
        gpu_checks.numbers("rope", False, "cpu", triton)
    assert (seen, rotary.TRITON) == ([original, False], original)


def test_speed_is_that_of_the_bench_and_what_is_open_stays_marked(tmp_path):
    assert gpu_speed.measure(tmp_path, gpu_speed.SMALL, "cpu", seconds=-1) == ["rope", "learned"]
    only = {"rope": gpu_speed.SMALL["rope"]}
    open_, _ = gpu_speed.rows_of(tmp_path / "rope.json", only["rope"])
    assert "peer/ours >= 1.5: open |" in markdown([open_])[-1]
    assert gpu_speed.measure(tmp_path, only, "cpu", seconds=600) == []
    measured = gpu_speed.rows_of(tmp_path / "rope.json", only["rope"])
    assert [row["mode"] for row in measured] == ["inference", "training"]
    assert all(len(row["peer_ours"]) == 3 and not row.get("open") for row in measured)
    told = gpu_speed.table(tmp_path / "none")
    assert told.startswith("0 of ")
    assert told.count("open: not measured yet") == sum(len(plan(config)) for config in gpu_speed.PLAN.values())


@pytest.mark.parametrize("position", ["alibi", "lookhere"])
def test_a_model_of_ours_is_compared_with_its_biases_as_matrices(position, tmp_path):
    word = f"vit2dpe_tiny_patch16_224(position={position}, embed_dim=48, num_heads=3, patch_size=8)"
    models = contenders.contenders(word, (16, 24), 2, depth=2)
    signals = [encodings_of(models[kind])[0](Positions.grid((2, 3))) for kind in ("peer", "ours")]
    assert [{type(term) for term in signal.bias} for signal in signals] == [{Dense}, {Distance}]
    config = gpu_speed._config(word, 2, "16x24", "training", depth=2, repeats=2, device="cpu", out=str(tmp_path / "a"))
    (row,) = bench(config)
    assert len(row["peer_ours"]) == len(row["ours_limit"]) == 3
    with pytest.raises(ConfigError, match="measured as a whole, got level=block"):
        contenders.contenders(word, (16, 24), 2, level="block")


def test_what_gpus_are_wanted_for_is_planned():
    """ViT-S and ViT-B at 224 and 1,024 pixels and Swin-T, inference and training; every row can be planned."""
    rows = [row for config in gpu_speed.PLAN.values() for row in plan(config) if row["level"] == "encoder"]
    for model, sides in (("vit_small", (224, 1024)), ("vit_base", (224, 1024)), ("swin_tiny", (224,))):
        for side in sides:
            modes = {row["mode"] for row in rows if model in row["model"] and row["height"] == side}
            assert modes == {"inference", "training"}, (model, side)
    names = {row["model"] for config in gpu_speed.PLAN.values() for row in plan(config)}
    assert not [name for name in names if not contenders._read(name)]
