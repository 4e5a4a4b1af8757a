"""timm's own scripts with our names: `python -m vit2dpe.timm train.py --model vit2dpe_small_patch16_224 ...`.

timm finds models by the names that imported modules registered, and its scripts import none but timm. This registers
ours and then runs the script as if it had been called itself: same arguments, same working directory, its own folder
first on the path. The scripts come with timm's repository, not with its wheel.

    python -m vit2dpe.timm validate.py --model vit2dpe_small_patch16_224 --model-kwargs position=rope --data-dir ...
    torchrun --nproc-per-node 4 -m vit2dpe.timm train.py ...
    python -m vit2dpe.timm bulk_runner.py --module yes --model-list "vit2dpe_*" vit2dpe.timm validate.py ...
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = "usage: python -m vit2dpe.timm <script of timm> [its arguments]"
WHERE = "timm's scripts come with its repository (huggingface/pytorch-image-models), not with its wheel: give the path"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script as `__main__` with our names registered. 2: there is no such script; else the script's own end."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{WHERE} to your copy of one.")
        return 0 if args else 2
    script = Path(args[0])
    if not script.is_file():
        print(f"vit2dpe.timm: there is no script {script}; {WHERE}", file=sys.stderr)
        return 2
    importlib.import_module("vit2dpe.models")
    before = sys.argv, list(sys.path)
    sys.argv = args
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
