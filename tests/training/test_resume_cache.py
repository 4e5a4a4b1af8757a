"""A run goes on where images that were in memory stay on disk now, and the other way round."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.data.pictures import pixels, save
from tests.helpers import seal
from vit2dpe.data import sources
from vit2dpe.data.settings import DataConfig
from vit2dpe.errors import CheckpointError
from vit2dpe.training import pretrain, train
from vit2dpe.training.checkpoint import read_meta
from vit2dpe.training.pretrain_settings import PretrainConfig
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig, TrainConfig

need = pytest.mark.need("D10")
MODEL = ModelConfig(patch=4, width=16, depth=1, heads=2, position="rope")


@pytest.fixture
def root(tmp_path, cache):
    for i in range(16):
        split = "val" if i < 4 else "train"
        save(tmp_path / "data" / split / "ab"[i % 2] / f"{i}.bmp", pixels(i, 8, 8))
    return tmp_path / "data"


def settings(root, out, cache, epochs=1, **more):
    return TrainConfig(
        model=MODEL,
        data=DataConfig("folder", str(root), cache=cache, workers=0, **more),
        optim=OptimConfig(epochs=epochs, warmup_epochs=0, batch_size=6),
        run=RunConfig(str(out), device="cpu", threads=1),
        resume=epochs > 1,
    )


def older(folder, digest):
    """A checkpoint as older versions wrote it, of one digest alone."""
    meta = read_meta(folder / "last")
    meta.pop("digest_of_files", None)
    (folder / "last/model.json").write_text(json.dumps(seal(meta | {"digest": digest})))


@need
@pytest.mark.parametrize(("free", "then"), [(2**40, 0), (0, 2**40)])
def test_auto_decides_otherwise(root, tmp_path, monkeypatch, free, then):
    monkeypatch.setattr(sources, "free_memory", lambda: free)
    monkeypatch.setattr("vit2dpe.data.splits.SAMPLE", 5)  # mean and deviation differ, too
    folder = train(settings(root, tmp_path / "run", "auto"))
    before = read_meta(folder / "last")
    monkeypatch.setattr(sources, "free_memory", lambda: then)
    train(settings(root, tmp_path / "run", "auto", 2))
    after = read_meta(folder / "last")
    assert after["state"]["epoch"] == 2
    assert after["digest"] != before["digest"]
    assert (after["digest_of_files"], after["mean"], after["std"]) == (
        before["digest_of_files"], before["mean"], before["std"],
    )  # fmt: skip


@need
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_runs_of_older_versions_go_on(root, tmp_path, cache):
    folder = train(settings(root, tmp_path / "run", cache))
    meta = read_meta(folder / "last")
    listing = meta["digest_of_files"].partition("-")[0]
    older(folder, listing if cache == "none" else meta["digest"])
    train(settings(root, tmp_path / "run", cache, 2))
    if cache == "memory":
        older(folder, meta["digest"])
        with pytest.raises(CheckpointError, match=r"other data.*older version.*--data\.cache memory"):
            train(settings(root, tmp_path / "run", "none", 3))
        older(folder, listing)
        train(settings(root, tmp_path / "run", cache, 3))


@need
def test_other_data_are_refused_however_they_are_cached(root, tmp_path):
    train(settings(root, tmp_path / "run", "none"))
    for cache in ("memory", "none"):
        for more in (dict(limit_train=4), dict(source_size=(12, 12)), dict(val_fraction=0.5)):
            with pytest.raises(CheckpointError, match=r"trained on other data"):
                train(settings(root, tmp_path / "run", cache, 2, size=(8, 8), **more))


@need
def test_a_pretraining_too(root, tmp_path):
    same = settings(root, tmp_path / "run", "memory")
    config = PretrainConfig(model=MODEL, data=same.data, optim=same.optim, run=same.run, pictures=0, mask_ratio=0.5)
    config = replace(config, decoder=replace(config.decoder, width=16, heads=2))
    folder = pretrain(config)
    config = replace(
        config, resume=True, optim=replace(config.optim, epochs=2), data=replace(config.data, cache="none")
    )
    pretrain(config)
    assert read_meta(folder / "last")["state"]["epoch"] == 2
    assert read_meta(folder / "encoder")["digest_of_files"] == read_meta(folder / "last")["digest_of_files"]
