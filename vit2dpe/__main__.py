"""`python -m vit2dpe`."""

import sys

from .cli import main

sys.exit(main())
