"""``python -m smlp.train``: the same command as ``smlp train``."""

import sys

from smlp.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
