"""Check the Hopper kernel on its GPU and time it next to Triton's kernels.

python -m benchmarks.hopper           # all stages that it takes
python -m benchmarks.hopper small-14  # one of them
python -m benchmarks.hopper once      # one launch of each kind, for a checker to watch
"""

import argparse
import json
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.shapes import STAGES, Shape
from benchmarks.workbench import open_workbench
from smlp.testing import EPS, compare_block
from smlp_kernels import fused_smlp, hopper, ops
from smlp_kernels.hopper import plan
from smlp_kernels.launch import INT32_MAX
from smlp_kernels.weights import Weights

ONCE = (Shape("14x14", 2, 136, 14, 14), Shape("7x7", 2, 72, 7, 7), Shape("28x28", 2, 40, 28, 28))
TAKEN = [s for s in STAGES if s.height <= plan.largest_size(s.channels)]


def hopper_mix(x: Tensor, weights: Weights) -> Tensor:
    """The block by the Hopper kernel alone; why it did not run has been logged."""
    y = hopper.mix(x, weights)
    if y is None:
        raise RuntimeError("the Hopper kernel did not run")
    return y


def block(shape: Shape) -> dict[str, Any]:
    """Output and input gradient against float64, and the microseconds of both kernels for each.

    Raises:
        RuntimeError: naming what is not equal to rounding.
    """
    with open_workbench(shape, "bf16", "channels_last", "inference", []) as bench:
        bench.block.requires_grad_(False)  # one kernel is the whole backward then
        weights = Weights(*bench.block.weights())
        (x, dy), *_ = pairs = bench.inputs("channels_last")
        ops.run_hopper, plan.CUBLAS_PIXELS = hopper_mix, INT32_MAX  # whatever the plan prefers
        results = compare_block(fused_smlp, [x, *weights], dy, eps=EPS[torch.bfloat16])
        if wrong := [f"{result.name}: {result.problem}" for result in results if result.problem]:
            raise RuntimeError(f"{shape}: {'; '.join(wrong)}")
        ops.run_hopper = None  # for what is timed by name
        mixes = {"Hopper": hopper_mix, "Triton": lambda x, weights: ops.run_mix(x, *weights)}
        passes = {"forward": weights, "input gradient": weights.transposed()}
        stopwatches = {}
        for pass_, given in passes.items():
            for name, mix in mixes.items():
                calls = [partial(mix, x.detach(), given) for x, _ in pairs]
                stopwatches[f"{pass_} {name}"] = timing.graph_stopwatch(calls)
        return {
            "errors": {r.name: {"kernel": r.error, "PyTorch": r.peer_error} for r in results},
            "us": {name: found.median for name, found in timing.interleaved(stopwatches).items()},
        }


def once() -> None:
    """Both directions of each kind of kernel."""
    for shape in ONCE:
        with open_workbench(shape, "bf16", "channels_last", "inference", []) as bench:
            (x, dy), weights = bench.inputs("channels_last")[0], Weights(*bench.block.weights())
            hopper_mix(x.detach(), weights)
            hopper_mix(dy, weights.transposed())


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.hopper", None, __doc__.splitlines()[0])
    names = [shape.name for shape in TAKEN]
    parser.add_argument("what", nargs="?", choices=["once", *names], help="by default all stages")
    what = parser.parse_args().what
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("the Hopper kernel needs a GPU of compute capability 9.0")
    logging.basicConfig()  # why a kernel does not run
    if what == "once":
        once()
        return
    for shape in TAKEN:
        if what in (None, shape.name):
            print(json.dumps({shape.name: block(shape)}), flush=True)


if __name__ == "__main__":
    main()
