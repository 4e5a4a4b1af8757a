"""What a process does in test_jobs.py. A module of its own, because every process imports it: it must cost nothing."""

import os
import sys
import time
from pathlib import Path

from vit2dpe.errors import DataError


def lives_or_dies(folder, cell, progress):
    """Says who it is, and goes as its cell says, or leaves its number and its threads in the folder."""
    progress("said by", 0, {"process": os.getpid()})
    if cell == "dies":
        os._exit(9)
    if cell == "refuses":
        raise DataError("image 3 is unreadable")
    if cell == "takes long":
        time.sleep(300)
    import torch

    (folder / cell).write_text(f"{os.getpid()} {torch.get_num_threads()}")
    return [{"cell": cell, "threads": torch.get_num_threads()}]


def main(folder):
    from vit2dpe.study.jobs import each

    cells = [("takes long",), ("takes long",)]
    list(each(lives_or_dies, (folder,), cells, lambda *_: print("takes long", flush=True), jobs=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
