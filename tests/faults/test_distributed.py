"""Two processes train as one does, with whole and with sharded weights, and go on with each other's runs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.ranks import SPEC, go, uneven
from vit2dpe.data.datasets import load_images
from vit2dpe.data.settings import AugmentConfig
from vit2dpe.seeding import derive_seed
from vit2dpe.training.checkpoint import read_meta, read_tensors
from vit2dpe.training.distributed import ALONE, World
from vit2dpe.training.log import read_table
from vit2dpe.training.tasks.classification import ImageTask, evaluation_batches

fault = pytest.mark.fault
ROOT = Path(__file__).parents[2]


def torchrun(what, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--module", "tests.faults.ranks", what, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One process, and two that ran the same things."""
    folder = tmp_path_factory.mktemp("ranks")
    go(folder / "one", ALONE)
    go(folder / "frozen-one", ALONE, epochs=1, freeze=1)
    for how in ("ddp", "fsdp"):
        go(folder / f"resumed-{how}", ALONE, epochs=1)
    done = torchrun("trains", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Grad strides" not in done.stderr, "images of one channel are no reason to warn"
    assert json.loads((folder / "size.json").read_text()) == 2
    return folder


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(both, how):
    one, two = read_table(both / "one/metrics.csv"), read_table(both / how / "metrics.csv")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) <= 1e-5
        assert abs(a["test_loss"] - b["test_loss"]) <= 1e-5
        assert a["test_top1"] == pytest.approx(b["test_top1"], abs=1e-9)
    a, b = (read_tensors(both / run / "last", read_meta(both / run / "last"), "model") for run in ("one", how))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_leave_alone_what_is_frozen(both, how):
    one, two = (
        read_tensors(both / run / "last", read_meta(both / run / "last"), "model")
        for run in ("frozen-one", f"frozen-{how}")
    )
    torch.manual_seed(derive_seed(0, "init"))
    first = SPEC.build().state_dict()
    same = {name for name in two if torch.equal(two[name], first[name])}
    assert {name for name in two if name.startswith(("patch_embed.", "position.", "blocks.0."))} == same
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0)


@fault("F54")
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_goes_from_one_process_to_two_and_back(both, how):
    run = both / f"resumed-{how}"
    assert len(read_table(run / "metrics.csv")) == 2, "an epoch alone, an epoch of two"
    go(run, ALONE, resume=True)
    one, moved = read_table(both / "one/metrics.csv"), read_table(run / "metrics.csv")
    assert [row["step"] for row in moved] == [4, 8, 12]
    for a, b in zip(one, moved, strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) <= 1e-5
    meta = [read_meta(both / name / "last") for name in ("one", run.name)]
    assert meta[0]["files"].keys() == meta[1]["files"].keys()
    states = [
        read_tensors(both / name / "last", m, "optimizer") for name, m in zip(("one", run.name), meta, strict=True)
    ]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], atol=1e-4, rtol=0)


@pytest.mark.need("D5")
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_rank_without_an_item_adds_nothing(both, how):
    """And takes part in every exchange; the others' gradient is that of one process."""
    uneven(both, ALONE, how)
    numbers, items, finite, wanted = torch.load(both / f"uneven-{how}-1-0.pt", weights_only=True)
    assert (items, finite) == (2, True)
    for rank in (0, 1):
        found = torch.load(both / f"uneven-{how}-2-{rank}.pt", weights_only=True)
        assert found[:3] == ({name: pytest.approx(value) for name, value in numbers.items()}, 2, True)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[3][name], gradient)


@fault("F56")
def test_a_dead_rank_ends_the_others(tmp_path):
    done = torchrun("dies", tmp_path)
    assert done.returncode != 0
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60, "the others must not wait for ever"
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == [
        "model.json", "model.safetensors", "optimizer.safetensors", "raw.safetensors",
    ]  # fmt: skip
    meta = read_meta(tmp_path / "last")
    assert meta["state"]["step"] == 4, "the end of the last epoch that all finished"
    for name in meta["files"]:
        read_tensors(tmp_path / "last", meta, name)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_image_is_evaluated_once_and_every_share_is_disjoint(size):
    data = load_images("digits", limit_train=95, limit_test=41)
    parts = [list(evaluation_batches(data, (8, 12), 8, World(rank, size))) for rank in range(size)]
    labels = torch.cat([y for part in parts for _, y in part])
    assert torch.equal(labels, data.test.labels)
    assert len({len(part) for part in parts}) == 1, "as many batches on every rank"
    tasks = [
        ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True, policy="rand", erase=0.5), world=World(rank, size))
        for rank in range(size)
    ]
    whole = ImageTask(data, (8, 12), 24, augment=AugmentConfig(1, True, policy="rand", erase=0.5)).batch(1, 2)
    cut = [task.batch(1, 2) for task in tasks]
    for key in whole:
        assert torch.equal(torch.cat([batch[key] for batch in cut]), whole[key]), "draws do not depend on the ranks"
