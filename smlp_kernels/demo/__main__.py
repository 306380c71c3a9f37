"""``python -m smlp_kernels.demo``."""

import sys

from smlp_kernels.demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
