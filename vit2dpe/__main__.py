"""`python -m vit2dpe`."""

import sys

from .cli.main import main

sys.exit(main())
