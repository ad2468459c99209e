"""``python -m grass_lib``: the ``grass`` command from a checkout."""

import sys

from grass_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
