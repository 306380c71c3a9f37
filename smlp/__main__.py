"""``python -m smlp``: the same as the command ``smlp``."""

import sys

from smlp.cli import main

if __name__ == "__main__":
    sys.exit(main())
