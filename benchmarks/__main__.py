"""`python -m benchmarks`, which `vit2dpe bench` runs."""

import sys

from vit2dpe.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
