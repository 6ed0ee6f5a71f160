"""``python -m qcompile``: the command line."""

import sys

from qcompile.cli import main

sys.exit(main())
