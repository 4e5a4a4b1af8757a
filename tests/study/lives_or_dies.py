"""What a process does in test_jobs.py. A module of its own, because every process imports it: it must cost nothing."""

import os
import sys
import time
from functools import partial
from pathlib import Path

from vit2dpe.errors import DataError


def lives_or_dies(folder, trial, progress):
    """Says who it is, and goes as its trial says, or leaves its number and its threads in the folder."""
    progress("said by", 0, {"process": os.getpid()})
    if trial == "dies":
        os._exit(9)
    if trial == "refuses":
        raise DataError("image 3 is unreadable")
    if trial == "takes long":
        time.sleep(300)
    import torch

    (folder / trial).write_text(f"{os.getpid()} {torch.get_num_threads()}")
    return [{"trial": trial, "threads": torch.get_num_threads()}]


def main(folder):
    from vit2dpe.study.jobs import each

    trials = ["takes long", "takes long"]
    list(each(partial(lives_or_dies, folder), trials, lambda *_: print("takes long", flush=True), jobs=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
