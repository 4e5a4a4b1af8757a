"""F50 to F65: what machines and people do to a training while it runs."""

import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit2dpe
from tests.training.interrupted import after_updates
from vit2dpe import load_run
from vit2dpe.cli import main
from vit2dpe.data import loader as stream
from vit2dpe.data.settings import DataConfig
from vit2dpe.data.splits import FileSplit
from vit2dpe.errors import ConfigError, DataError, TrainingError
from vit2dpe.models.spec import ModelSpec
from vit2dpe.study import StudyConfig, study, trials
from vit2dpe.training.checkpoint import read_meta, read_tensors, write_checkpoint
from vit2dpe.training.engine import Trainer
from vit2dpe.training.log import read_table
from vit2dpe.training.objectives.images import train
from vit2dpe.training.run_folder import run_folder
from vit2dpe.training.settings import ModelConfig, OptimConfig, RunConfig, TrainConfig
from vit2dpe.training.tasks.classification import ImageTask

fault = pytest.mark.fault
MICRO = TrainConfig(
    model=ModelConfig(width=16, depth=1, heads=2),
    data=DataConfig(limit_train=64, limit_test=40, size="8x12"),
    optim=OptimConfig(epochs=3, warmup_epochs=1, batch_size=16),
    run=RunConfig(device="cpu"),
)
WORDS = [
    "--model.width",
    "16",
    "--model.depth",
    "1",
    "--model.heads",
    "2",
    "--data.limit_train",
    "64",
    "--data.limit_test",
    "40",
    "--data.size",
    "8",
    "--optim.batch_size",
    "16",
    "--optim.warmup_epochs",
    "1",
    "--run.device",
    "cpu",
]


def at(out, config=MICRO, **run):
    return replace(config, run=replace(config.run, out=str(out), **run))


def command(*words, env=None, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "vit2dpe", "train", *WORDS, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs,
    )  # fmt: skip


def environment(**changes):
    here = str(Path(vit2dpe.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": here, **changes}


@fault("F50")
def test_a_disk_that_is_full(tmp_path):
    def step(number, size):
        files = {"model": {"w": torch.full((size,), float(number))}}
        write_checkpoint(tmp_path / "last", ModelSpec("ViT", {}), files, state={"step": number})

    step(1, 1000)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # the system itself refuses to write on
    try:
        with pytest.raises(TrainingError, match=r"model-\w+\.safetensors, 400,\d+ bytes, [\d,]+ free: File too large"):
            step(2, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    meta = read_meta(tmp_path / "last")
    assert meta["state"]["step"] == 1
    assert read_tensors(tmp_path / "last", meta, "model")["w"].unique().item() == 1
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == ["model.json", "model.safetensors"]


@fault("F50")
def test_a_full_disk_ends_a_training_with_one_line(tmp_path, monkeypatch, capsys):
    real = os.fsync

    def full(handle):
        if sum(1 for _ in (tmp_path / "out").glob("last/model.json")):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert main(["train", *WORDS, "--optim.epochs", "3", "--run.out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"vit2dpe: cannot write .*out.*bytes.*No space left on device", error)
    assert read_meta(tmp_path / "out/last")["state"]["step"] == 4
    load_run(tmp_path / "out")


@fault("F51")
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setattr("vit2dpe.training.objectives.images.load_fitted", None)  # before data are read
    assert main(["train", *WORDS, "--run.out", str(tmp_path / "file/run")]) == 2
    assert re.search(r"cannot write to .*file/run.*--run\.out", capsys.readouterr().err)


@fault("F52")
def test_signals_to_the_command(tmp_path):
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out = tmp_path / str(code)
        process = command("--optim.epochs", "100000", "--run.out", out)
        while not (out / "last/model.json").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code, error
        assert "stopped at step" in error
        assert "Traceback" not in error
        assert not (out / "lock").exists()
        load_run(out)


@fault("F52")
def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    from vit2dpe.training.interrupts import Interrupts

    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with Interrupts() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert (signals.received, left) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert left == [143]


@fault("F57")
def test_a_poisoned_image(tmp_path, monkeypatch):
    real = ImageTask.batch

    def poisoned(self, epoch, step):
        batch = real(self, epoch, step)
        batch["images"][batch["index"] == 7] = float("nan")
        return batch

    monkeypatch.setattr(ImageTask, "batch", poisoned)
    out = train(at(tmp_path / "one"))
    entries = [json.loads(line) for line in (out / "bad_batches.jsonl").read_text().splitlines()]
    assert len(entries) == 3, "once an epoch"
    assert all(7 in entry["index"] and entry["loss"] == "nan" for entry in entries)
    assert [row["step"] for row in read_table(out / "metrics.csv")] == [4, 8, 12]
    assert all(value.isfinite().all() for value in load_run(out).state_dict().values())

    def all_bad(self, epoch, step):
        batch = real(self, epoch, step)
        return batch if (epoch, step) < (1, 1) else batch | {"images": batch["images"] * float("nan")}

    monkeypatch.setattr(ImageTask, "batch", all_bad)
    with pytest.raises(TrainingError, match=r"3 times in a row, last at epoch 1, step 3"):
        train(at(tmp_path / "all"))
    assert read_meta(tmp_path / "all/last")["state"]["step"] == 5, "the last good one"
    load_run(tmp_path / "all")


@fault("F58")
def test_out_of_memory(tmp_path, monkeypatch, capsys):
    real, left = ImageTask.loss, iter(range(4))  # steps of the first epoch

    def hungry(self, model, batch):
        if model.training and next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, model, batch)

    monkeypatch.setattr(ImageTask, "loss", hungry)
    assert main(["train", *WORDS, "--optim.epochs", "3", "--run.out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for part in ("out of memory at epoch 1, step 0 with 16 images", "--optim.accumulate 2", "--resume", "2.00 GiB"):
        assert part in error
    assert read_meta(tmp_path / "out/last")["state"]["step"] == 4


@fault("F59")
def test_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    train(
        at(
            tmp_path / "auto",
            replace(MICRO, smoke=False, optim=replace(MICRO.optim, epochs=1, warmup_epochs=0)),
            device="auto",
        )
    )
    assert "note: no GPU was found" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "vit2dpe", "train", "--run.device", "cuda", "--run.out", str(tmp_path / "cuda")],
        capture_output=True, text=True, check=False, env=environment(CUDA_VISIBLE_DEVICES=""), timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "device 'cuda' cannot be used here" in done.stderr
    assert not (tmp_path / "cuda").exists()


@pytest.mark.need("D10")
@fault("F60")
def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    seen = []
    real = Trainer._evaluate

    def second(self):
        if not seen:
            seen.append(True)
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} {socket.gethostname()}"):
                train(at(tmp_path))
        return real(self)

    monkeypatch.setattr(Trainer, "_evaluate", second)
    train(at(tmp_path))
    assert seen
    (tmp_path / "lock").write_text("1 node17")  # left by a kill on another host; its number lives here, too
    train(replace(at(tmp_path), resume=True))
    assert not (tmp_path / "lock").exists()


@pytest.mark.need("D10")
@fault("F60")
def test_a_killed_run_lets_go_of_its_folder_whatever_its_workers_do(tmp_path):
    hold = "import os, sys, time; from vit2dpe.training.run_folder import run_folder\n"
    hold += "with run_folder(sys.argv[1]):\n    os.fork() and print(os.getpid(), flush=True); time.sleep(5)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == f"{holder.pid}\n"
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} "), run_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with run_folder(tmp_path) as folder:
        assert (folder / "lock").read_text() == f"{os.getpid()} {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []


@fault("F61")
def test_an_interrupted_study(tmp_path, monkeypatch):
    micro = dict(
        encodings="none,rope,alibi", sizes="16,24", modes="scale", policies="default", epochs=1, limit_train=64,
        limit_test=40, width=16, depth=1, heads=2, batch_size=32, device="cpu", jobs=1,
    )  # fmt: skip
    study(StudyConfig.of(micro, out=str(tmp_path / "whole")))
    real = trials.fit

    def dies(*args, folder, **kwargs):
        if folder.name.startswith("alibi"):
            raise KeyboardInterrupt
        return real(*args, folder=folder, **kwargs)

    monkeypatch.setattr(trials, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        study(StudyConfig.of(micro, out=str(tmp_path / "cut")))
    cut = read_table(tmp_path / "cut/results.csv")
    assert {row["encoding"] for row in cut} == {"none", "rope"}
    trained = []
    monkeypatch.setattr(
        trials, "fit", lambda *a, folder, **k: (trained.append(folder.name), real(*a, folder=folder, **k))[1]
    )
    study(StudyConfig.of(micro, out=str(tmp_path / "cut")))
    assert len(trained) == 1
    assert (tmp_path / "cut/results.csv").read_bytes() == (tmp_path / "whole/results.csv").read_bytes()


@fault("F62")
def test_a_clock_that_jumps(tmp_path, monkeypatch):
    hours = iter(range(10**9, 0, -7200))
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    rows = read_table(train(at(tmp_path / "a")) / "metrics.csv")
    assert all(row["seconds"] >= 0 for row in rows)
    sources = "".join(path.read_text() for path in Path(vit2dpe.__file__).parent.rglob("*.py"))
    assert "time.monotonic(" in sources
    assert "time.time(" not in sources, "durations are of the monotonic clock"


@fault("F63")
@pytest.mark.parametrize(
    "name", ["with spaces and 'quotes'", "näme-ü-漢字", os.fsdecode(b"bytes-\xff-\xfe"), "x" * 200]
)
def test_paths(tmp_path, name, capsys):
    out = tmp_path / name
    small = replace(MICRO, optim=replace(MICRO.optim, epochs=1, warmup_epochs=0))
    train(at(out, small), f"vit2dpe train --run.out {out}")
    load_run(out)
    assert (out / "summary.md").is_file()
    train(replace(at(out, replace(small, optim=replace(small.optim, epochs=2))), resume=True))
    assert len(read_table(out / "metrics.csv")) == 2
    capsys.readouterr().out.encode()


@fault("F62", "F64", "F65")
def test_other_hash_seeds_no_home_no_network_no_time_zone(tmp_path):
    environments = [
        environment(PYTHONHASHSEED="1", TZ="Nowhere/Land"),
        {
            k: v
            for k, v in environment(PYTHONHASHSEED="2", http_proxy="http://127.0.0.1:9").items()
            if k not in ("HOME", "TZ")
        },
    ]
    running = [
        command("--optim.epochs", "2", "--run.out", tmp_path / str(i), "--run.threads", "1", env=env)
        for i, env in enumerate(environments)
    ]
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    files = [(tmp_path / str(i) / "last/model.safetensors").read_bytes() for i in range(2)]
    assert files[0] == files[1]


def streaming(tmp_path, **data):
    """Settings of a training whose images stay on disk: 2 classes of 16 to train on, 4 to test."""
    draws = np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 4)):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = draws.integers(0, 256, (8, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    data = DataConfig("folder", str(tmp_path / "data"), "8x12", cache="none", workers=2, **data)
    return replace(at(tmp_path / "out"), data=data, model=replace(MICRO.model, patch=4, position="rope"))


@fault("F55")
def test_a_data_worker_that_is_killed(tmp_path):
    config, killed = streaming(tmp_path), []
    config = replace(config, optim=replace(config.optim, epochs=5))

    def kill(trainer):
        victim = next(p for p in multiprocessing.active_children() if p.pid not in killed)
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(2)  # torch is told by a signal

    began = time.monotonic()
    message = r"data worker [01] \(process \d+\).* Killed.*--data\.workers"
    with after_updates({3: kill}), pytest.raises(TrainingError, match=message) as caught:
        train(config)
    assert f"process {killed[0]}" in str(caught.value)
    assert re.search(r"at .*/train/[ab]/\d+\.png and 15 more", str(caught.value))
    assert time.monotonic() - began < 60
    assert read_meta(tmp_path / "out/last")["state"]["step"] == 2, "the last whole epoch is kept"
    train(replace(config, resume=True))
    train(replace(config, run=replace(config.run, out=str(tmp_path / "whole"))))
    weights = [(tmp_path / run / "last/model.safetensors").read_bytes() for run in ("out", "whole")]
    assert weights[0] == weights[1]


@fault("F55")
def test_a_data_worker_that_cannot_read(tmp_path):
    config = streaming(tmp_path)
    damaged = sorted((tmp_path / "data/train/b").iterdir())
    config = replace(config, optim=replace(config.optim, epochs=9))  # read ahead, so a later epoch meets them
    with (
        after_updates({2: lambda _: [path.write_bytes(b"") for path in damaged]}),
        pytest.raises(DataError, match=r"cannot read the image .*/train/b/\d+\.png"),
    ):
        train(config)
    load_run(tmp_path / "out")


@fault("F55")
def test_a_data_worker_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE_S", 1.0)
    config, real = streaming(tmp_path), FileSplit.read

    def hangs(self, index):
        if multiprocessing.parent_process() is not None and self.path(index).endswith("train/a/7.png"):
            time.sleep(100)
        return real(self, index)

    monkeypatch.setattr(FileSplit, "read", hangs)
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"data worker [01] .*/train/.*png.* gave no batch within 1 seconds"):
        train(config)
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()
