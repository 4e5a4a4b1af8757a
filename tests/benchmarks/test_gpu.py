"""The run for a GPU goes through on a CPU, small; what its folder holds is not done again, and errors are rows."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, gpu_speed
from benchmarks.resumable import Rows

ROOT = Path(__file__).parents[2]


def run(out, **settings):
    env = os.environ | dict(DEVICE="cpu", SMALL="1", EPOCHS="1", SEEDS="1", JOBS="1", OMP_NUM_THREADS="1") | settings
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "9", str(out)]
    return subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, timeout=600, check=True)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_stage_leaves_its_results_and_another_run_goes_on_with_them(tmp_path):
    out, again = tmp_path / "gpu", tmp_path / "again"
    done = run(out)
    checks, speed = rows_of(out / "checks.jsonl"), rows_of(out / "speed.jsonl")
    numbers = [f"numbers {word} {tokens}" for word in ("rope", "relative") for tokens in (64, 65)]
    assert [row["row"] for row in checks] == ["about", *numbers]
    assert all(row["right"] for row in checks[1:])
    assert [row["row"] for row in speed[1:]] == [
        f"tiny B2 {word} {mode} eager" for mode in ("training", "inference") for word in ("rope", "learned")
    ]
    assert not [row for row in checks + speed if "failed" in row]
    assert (out / "study/summary.md").is_file(), done.stdout + done.stderr
    assert "Python" in (out / "doctor.txt").read_text()
    lines = (out / "checks.jsonl").read_text().splitlines(keepends=True)
    (out / "checks.jsonl").write_text("".join(lines[:-1]))  # as if it had been stopped before the last
    run(again, KEPT=str(out), STAGES="doctor checks study")
    assert (again / "checks.jsonl").read_text().startswith("".join(lines[:-1]))
    assert [row["row"] for row in rows_of(again / "checks.jsonl")] == ["about", *numbers]
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file() and path.name != "checks.jsonl"]
    assert all((again / path).read_bytes() == (out / path).read_bytes() for path in files)


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


def test_every_peer_is_made_and_has_a_ratio():
    for encoding in gpu_speed.PEERS:
        facts = gpu_speed.measured(encoding, gpu_speed.SMALL["tiny B2"], True, "eager", "cpu", repeats=2)
        assert ("peer_ours" in facts) == (gpu_speed.PEERS[encoding] is not None)
        assert len(facts["ours_none"]) == 3
