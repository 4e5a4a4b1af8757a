"""Trials in which a process is killed, by one process that forks.

    python -m tests.faults.killing <what> <folder> <trials>         writes JSON lines

Torch is imported once; each trial is a fork that is really killed with SIGKILL, at a random time or at the k-th time
that it opens, syncs, renames or removes a file.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

torch.set_num_threads(1)

from vit2dpe.errors import CheckpointError  # noqa: E402
from vit2dpe.models.spec import ModelSpec  # noqa: E402
from vit2dpe.training import checkpoint  # noqa: E402
from vit2dpe.training.checkpoint import read_meta, read_tensors, settle, write_checkpoint  # noqa: E402

SPEC = ModelSpec("ViT", {"position": "rope"})


def fork(work):
    """The child's process id; it runs `work` and leaves with its result."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = work() or 0
    except SystemExit as left:
        status = left.code
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(status)


def write(folder, step, size=20_000):
    files = {
        "model": {"w": torch.full((size,), float(step)), "b": torch.tensor(step)},
        "optimizer": {"m": torch.full((2 * size,), float(-step))},
    }
    write_checkpoint(folder, SPEC, files, state={"step": step})


def read(folder):
    """The step of a checkpoint of which every byte belongs together; an error else."""
    meta = read_meta(folder)
    model, moments = (read_tensors(folder, meta, name) for name in ("model", "optimizer"))
    steps = {meta["state"]["step"], int(model["b"]), *model["w"].unique().tolist(), *(-moments["m"].unique()).tolist()}
    if len(steps) != 1:
        raise CheckpointError(f"the files are of different steps: {steps}")
    return steps.pop()


def random_times(folder, trials):
    """A writer in a loop, killed at a random time."""
    write(folder, 0)
    for trial in range(trials):
        wrote, tell = os.pipe()

        def loop(tell=tell):
            step = read(folder)
            while True:
                step += 1
                write(folder, step)
                os.write(tell, b".")

        child = fork(loop)
        os.read(wrote, 1)  # a busy machine must not kill it before it begins
        time.sleep(random.Random(trial).uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(wrote)
        os.close(tell)
        yield dict(step=read(folder), left=leftovers(folder))


def boundaries(folder, trials):
    """One write, killed at its k-th contact with the disk, for every k until it is not."""
    for k in range(1, trials + 1):
        target = folder / str(k)
        write(target, 1, 100)

        def dies(target=target, k=k):
            seen = 0

            def count(event, *_):
                nonlocal seen
                counts = event in ("open", "os.rename", "os.remove", "fsync")
                seen += counts
                if counts and seen == k:
                    os.kill(os.getpid(), signal.SIGKILL)

            real = os.fsync
            sys.addaudithook(count)
            os.fsync = lambda handle: (count("fsync"), real(handle), count("fsync"))
            write(target, 2, 100)

        _, status = os.waitpid(fork(dies), 0)
        finished = os.WIFEXITED(status)
        yield dict(k=k, step=read(target), left=leftovers(target), finished=finished)
        if finished:
            return


def leftovers(folder):
    """What is there beside the checkpoint once the next process looked."""
    settle(folder)
    names = {"model.json", "model.safetensors", "optimizer.safetensors"}
    return sorted(p.name for p in folder.iterdir() if p.name not in names)


def trainings(folder, trials):
    """A training killed at a random time, then resumed; every other is asked to stop, with SIGTERM or SIGINT."""
    from dataclasses import replace

    from tests.training import test_resume as micro
    from vit2dpe.data.datasets import load_images
    from vit2dpe.training.engine import fit

    data = load_images("digits", limit_train=96, limit_test=40)
    run = replace(micro.RUN, save_minutes=1e-4)  # saves at most steps

    def training(target, resume=False):
        fit(micro.build(), micro.task(data), micro.OPTIM, run, folder=target, spec=micro.SPEC, resume=resume)

    began = time.monotonic()
    os.waitpid(fork(lambda: training(folder / "whole")), 0)
    duration = time.monotonic() - began
    for trial in range(trials):
        target = folder / str(trial)
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[trial % 4]
        child = fork(lambda target=target: training(target))
        time.sleep(random.Random(trial).uniform(0.05, 0.9) * duration)
        with suppress(ProcessLookupError):
            os.kill(child, how)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step = read_meta(target / "last")["state"]["step"] if (target / "last" / "model.json").is_file() else 0
        again = os.waitstatus_to_exitcode(os.waitpid(fork(lambda target=target: training(target, True)), 0)[1])
        try:
            micro.same(folder / "whole", target)
            same = True
        except AssertionError:
            same = False
        yield dict(signal=int(how), status=status, step=step, again=again, same=same)


def main():
    what, folder, trials = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    checkpoint.save({"x": torch.zeros(1)})  # imported before the forks
    for result in {"random": random_times, "boundaries": boundaries, "trainings": trainings}[what](folder, trials):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
