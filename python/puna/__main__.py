"""`python -m puna` is the `puna` command."""

import sys

from puna.cli import main

sys.exit(main())
