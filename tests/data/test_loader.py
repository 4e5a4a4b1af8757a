"""Images that stay on disk give the same bits as images in memory, with any number of workers, resumed anywhere."""

import multiprocessing
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.interrupted import Killed, after_updates, die
from tests.training.test_resume import CLOCKED, everything
from vit2dpe import ViT
from vit2dpe.data import sources
from vit2dpe.data.datasets import load_images
from vit2dpe.data.loader import lost_worker, stream, watch_workers
from vit2dpe.data.settings import AugmentConfig, DataConfig
from vit2dpe.data.splits import FileSplit
from vit2dpe.errors import ConfigError, DataError
from vit2dpe.resolution.sweep import evaluate
from vit2dpe.training.distributed import World
from vit2dpe.training.engine import Trainer
from vit2dpe.training.log import read_table
from vit2dpe.training.objectives.images import train
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig, TrainConfig
from vit2dpe.training.tasks.classification import ImageTask, evaluation_batches


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes of 11 pictures of 10 to 14 by 12 to 16 pixels to train on, 7 to test."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, n in (("train", 11), ("val", 7)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = draws.integers(0, 256, (10 + i % 5, 12 + i % 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT2DPE_CACHE", str(tmp_path / "cache"))


# torch advises against more workers than cores; here that they change nothing is the point.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
AUGMENT = AugmentConfig(1, True, policy="trivial", erase=0.5, mixup=0.8, cutmix=1.0)


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_no_bit(root, workers):
    kept, disk = (load_images("folder", root, source_size=(10, 12), cache=cache) for cache in ("memory", "none"))
    assert isinstance(disk.train, FileSplit)
    assert (disk.mean, disk.std) == (kept.mean, kept.std)
    memory, stream = (ImageTask(d, (8, 12), 8, augment=AUGMENT, workers=workers) for d in (kept, disk))
    assert stream.steps_per_epoch == 3
    for epoch, step in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (0, 1)):  # in order over an epoch's end, then jumps
        same(memory.batch(epoch, step), stream.batch(epoch, step))
    stream.close()
    for size in (None, (12, 8)):
        pairs = zip(evaluation_batches(kept, size, 4), evaluation_batches(disk, size, 4, workers=workers), strict=True)
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


@pytest.mark.need("D7b")
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_ranks_without_a_test_image_count_nothing(root, cache):
    data, size = load_images("folder", root, source_size=(10, 12), cache=cache), 17  # 14 test images
    model = ViT("rope", img_size=(8, 12), patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    whole = evaluate(model, evaluation_batches(data, (8, 12), workers=0))
    ranks = [evaluation_batches(data, (8, 12), 256, World(rank, size), workers=0) for rank in range(size)]
    parts = [evaluate(model, batches, least=0) for batches in ranks]
    assert [part["n"] for part in parts].count(0) == 3
    assert sum(part["n"] for part in parts) == whole["n"] == 14
    for name in ("top1", "loss"):
        assert sum(part["n"] * part[name] for part in parts) / 14 == pytest.approx(whole[name], rel=1e-5)
    with pytest.raises(ConfigError, match="no images to evaluate"):
        evaluate(model, iter(()))


def config(root, out, **data):
    return TrainConfig(
        model=ModelConfig(width=16, depth=1, heads=2, patch=4, position="rope"),
        data=DataConfig("folder", str(root), "8x12", "10x12", cache="none", **data),
        augment=AugmentConfig(1, True),
        optim=OptimConfig(epochs=2, warmup_epochs=1, batch_size=8),
        run=RunConfig(device="cpu", out=str(out)),
    )


def test_a_streamed_run_goes_on_to_the_same_bits(root, tmp_path):
    train(config(root, tmp_path / "whole", workers=2))
    with after_updates({2: Trainer.save, 4: die}), pytest.raises(Killed):
        train(config(root, tmp_path / "cut", workers=3))
    train(replace(config(root, tmp_path / "cut", workers=1), resume=True))
    same(everything(tmp_path / "whole/last"), everything(tmp_path / "cut/last"))
    rows = [read_table(tmp_path / run / "metrics.csv") for run in ("whole", "cut")]
    rows = [[{k: v for k, v in row.items() if k not in CLOCKED} for row in run] for run in rows]
    assert rows[0] == rows[1]


def test_memory_decides_where_images_are_kept(root, monkeypatch):
    need = 36 * 10 * 12 * 3
    for free, kept in ((2 * need, True), (2 * need - 2, False)):
        monkeypatch.setattr(sources, "free_memory", lambda free=free: free)
        data = load_images("folder", root, source_size=(10, 12), cache="auto")
        assert isinstance(data.train, FileSplit) != kept
        assert any("stay on disk" in note for note in data.notes) != kept
    for ranks, kept in ((2, True), (3, False)):  # each of them keeps all images
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        monkeypatch.setattr(sources, "free_memory", lambda: 4 * need)
        data = load_images("folder", root, source_size=(10, 12), cache="auto")
        assert isinstance(data.train, FileSplit) != kept
    with pytest.raises(ConfigError, match=r"data\.cache none is of files"):
        load_images("digits", cache="none")
    with pytest.raises(ConfigError, match="did you mean 'memory'"):
        load_images("digits", cache="memroy")


def test_this_machine_has_memory():
    assert 2**20 < sources.free_memory() < 2**50


def test_a_containers_limit_counts_where_it_is_nearer(monkeypatch):
    told = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n"}
    group = "/sys/fs/cgroup/memory"
    monkeypatch.setattr(Path, "read_text", lambda path: told[str(path)] if str(path) in told else missing())
    monkeypatch.setattr(sources.os, "sysconf", lambda name: missing())

    def missing():
        raise OSError("not on this system")

    assert sources.free_memory() == 1000 * 1024
    for most, used, free in (("900000", "500000", 400_000), ("max", "500000", 1000 * 1024), ("9e9", "5", 1000 * 1024)):
        told |= {f"{group}.current": used, f"{group}.max": most}
        assert sources.free_memory() == free
    told |= {f"{group}.current": "1000", f"{group}.max": "90000000"}
    assert sources.free_memory() == 1000 * 1024
    told.clear()
    assert sources.free_memory() == 2**33, "a guess where nothing is known"


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_that_differ_are_named(root, workers):
    match = r"\.png is 1\dx1\d, others are 10x12.*--data\.source_size"
    with pytest.raises(DataError, match=match):
        load_images("folder", root, cache="none")
    data = load_images("folder", root, source_size=(10, 12), cache="none")
    task = ImageTask(replace(data, train=replace(data.train, source=None)), (8, 12), 8, workers=workers)
    with pytest.raises(DataError, match=match):
        task.batch(0, 0)
    task.close()


def test_streams_belong_to_the_training_that_opened_them(root):
    data = load_images("folder", root, source_size=(10, 12), cache="none")

    def opened():
        with watch_workers() as streams:
            batches = stream(data.train, [torch.arange(4)], workers=1)
            next(batches)
            (pid,) = (child.pid for child in multiprocessing.active_children())
            lost = lost_worker(RuntimeError(f"DataLoader worker (pid {pid}) is killed by signal: Killed. "), streams)
            other = lost_worker(RuntimeError(f"worker (pid {pid}) is tired"), streams)
            batches.close()
            return str(lost), other, len(streams), multiprocessing.active_children()

    with watch_workers() as streams, ThreadPoolExecutor(1) as thread:
        message, other, left, children = thread.submit(opened).result()
        assert streams == []
    assert re.match(r"data worker 0 \(process \d+\) is killed by signal: Killed: if memory", message)
    assert (other, left, children) == (None, 0, [])
