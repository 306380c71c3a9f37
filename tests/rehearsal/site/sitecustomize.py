"""Read by Python at every start: with this folder on the path, there seems to be a GPU."""

import os
import sys
import traceback

if os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # "" hides the GPU, as from real programs
    try:
        from tests.rehearsal import machine

        machine.pretend()
    except BaseException:  # Python itself would ignore it, and there would seem to be none
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(97)
