"""The Hopper kernel on the GPU that it is for: is it right, how fast, and what decides that::

    python -m benchmarks.measure_hopper block small-14  # or: once; probes

Each runs in a process of its own, which a kernel that hangs or spoils the GPU ends alone.
"""

import argparse
import json
import logging
import statistics
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.measure_process import run_checker, run_module
from benchmarks.recorder import Context, Measurement, SkippedError
from benchmarks.shapes import BY_NAME, STAGES, Shape
from benchmarks.workbench import open_workbench
from smlp.testing import EPS, compare_block, random_arguments
from smlp_kernels import fused_smlp, hopper, ops
from smlp_kernels.hopper import plan as hopper_plan
from smlp_kernels.hopper.plan import RESIDENT_SIZE, STRIPS_CHANNELS, STRIPS_SIZE, Plan
from smlp_kernels.launch import INT32_MAX
from smlp_kernels.weights import Weights

PROBES = Path(__file__).with_name("hopper_probes.ptx.xz")
PROBE = struct.Struct("2Q3i4x")  # cycles, data, rounds, bytes, apart: Probe in hopper_probes.cu
PROBE_SHARED = 112 << 10  # bytes of a block
ROUNDS = 1000
COPY_BYTES = {"of its own": 48 << 12, "the same for all": 768 << 10}  # a multiple of 6144
ONCE = (Shape("14x14", 2, 136, 14, 14), Shape("7x7", 2, 72, 7, 7), Shape("28x28", 2, 40, 28, 28))


def measurements() -> list[Measurement]:
    """Values and times of the stages that it takes, then its races, then the probes."""
    taken = [
        s.name
        for s in STAGES
        if s.height <= (STRIPS_SIZE if s.channels <= STRIPS_CHANNELS else RESIDENT_SIZE)
    ]
    racecheck = partial(in_child, ("once",), checker="racecheck")
    return [
        *(Measurement(f"Hopper kernel {n}", partial(in_child, ("block", n))) for n in taken),
        Measurement("Hopper kernel racecheck", racecheck, seconds=120.0),
        Measurement("Hopper kernel probes", partial(in_child, ("probes",))),
    ]


def in_child(job: tuple[str, ...], context: Context, checker: str = "") -> dict[str, Any]:
    """What a job of this module finds, or the tool of compute-sanitizer that watches it."""
    if torch.cuda.get_device_capability() != (9, 0):
        raise SkippedError("the Hopper kernel needs compute capability 9.0")
    if checker:
        return run_checker(context, checker, "measure_hopper", *job, env={})
    return json.loads(run_module(context, "measure_hopper", *job))


def hopper_mix(x: Tensor, weights: Weights) -> Tensor:
    """The block by the Hopper kernel alone; why it did not run has been logged."""
    y = hopper.mix(x, weights)
    if y is None:
        raise RuntimeError("the Hopper kernel did not run")
    return y


def operands(shape: Shape) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """x and dy, channels last, and random weights, in bfloat16."""
    size = (shape.batch, shape.height, shape.width, shape.channels, torch.bfloat16)
    (x, weights), (dy, _) = (random_arguments(*size, device=DEVICE, seed=seed) for seed in (0, 1))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return x, dy, weights


def block(shape: Shape) -> dict[str, Any]:
    """Output and input gradient against float64, and the microseconds of both kernels for each."""
    x, dy, weights = operands(shape)
    ops.run_hopper, hopper_plan.CUBLAS_PIXELS = hopper_mix, INT32_MAX  # whatever the plan prefers
    arguments = [x.detach().requires_grad_(), *weights]
    results = compare_block(fused_smlp, arguments, dy, eps=EPS[torch.bfloat16])
    found: dict[str, Any] = {
        "errors": {r.name: {"kernel": r.error, "PyTorch": r.peer_error} for r in results},
        "failures": {r.name: r.problem for r in results if r.problem},
    }
    ops.run_hopper = None  # for what is timed by name
    plain = Weights(*weights)
    mixes = {"Hopper": hopper_mix, "Triton": lambda x, weights: ops.run_mix(x, *weights)}
    with open_workbench(shape, "bf16", "channels_last") as bench, torch.no_grad():
        inputs = [x.detach() for x, _ in bench.inputs("channels_last")]
        stopwatches = {}
        for pass_, given in (("forward", plain), ("input gradient", plain.transposed())):
            for name, mix in mixes.items():
                calls = [partial(mix, x, given) for x in inputs]
                estimate = timing.event_us(calls[0])
                stopwatches[f"{pass_} {name}"] = timing.graph_stopwatch(calls, estimate)
        found["us"] = timing.interleaved(stopwatches)
    return found


def once() -> None:
    """Both directions of each kind of kernel, for a checker to watch."""
    for shape in ONCE:
        x, dy, weights = operands(shape)
        hopper_mix(x, Weights(*weights))
        hopper_mix(dy, Weights(*weights).transposed())
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Probe(NamedTuple):
    """A launch of one of ``hopper_probes.cu``; for the loader like a call of the block."""

    plan: Plan
    cycles: Tensor
    data: Tensor
    sizes: tuple[int, int, int]

    def parameters(self) -> bytes:
        return PROBE.pack(self.cycles.data_ptr(), self.data.data_ptr(), *self.sizes)


def probes() -> dict[str, Any]:
    """Clocks of a step that does one thing or two at once; bytes of a clock from the L2 cache.

    mma.sync slips between products that are queued if "products and mma" is close to the larger of
    the two alone, and waits for them if it is close to their sum. The same for the loads and stores
    of matrices in shared memory. An SM's share of the L2 cache is read by all at once.
    """
    from smlp_kernels.hopper.driver import Driver, binary_of

    class ProbeDriver(Driver):
        def binary(self, kernel: str) -> bytes:
            return binary_of(kernel, PROBES)

    driver = ProbeDriver()
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    cycles = torch.zeros(blocks, dtype=torch.int64, device=DEVICE)
    own, shared = COPY_BYTES.values()
    data = torch.zeros(max(own * blocks, shared) // 8, dtype=torch.int64, device=DEVICE)

    def run(kernel: str, bytes_: int = 0, apart: int = 0) -> float:
        """Clocks of a round, the median of all blocks."""
        plan = Plan(kernel, (blocks, 1), PROBE_SHARED, ())
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(2):  # the first one may wait for the clock to rise
            driver.launch(Probe(plan, cycles, data, (ROUNDS, bytes_, apart)), 0, stream)
        return statistics.median(cycles.tolist()) / ROUNDS

    return {
        "clocks of a step": {
            "products": run("probe_products"),
            "mma": run("probe_mma"),
            "products and mma": run("probe_products_mma"),
            "matrices": run("probe_matrices"),
            "products and matrices": run("probe_products_matrices"),
        },
        "bytes of a clock and SM": {
            "of its own": own / run("probe_copy", own, own),
            "the same for all": shared / run("probe_copy", shared, 0),
        },
    }


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
JOBS = {"block": block, "once": once, "probes": probes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("shape", nargs="?", choices=sorted(BY_NAME), help="of the block")
    arguments = parser.parse_args()
    if (arguments.job == "block") != (arguments.shape is not None):
        parser.error("shape: expected for a block, and for nothing else")
    logging.basicConfig()  # why a kernel does not run
    given = [BY_NAME[arguments.shape]] if arguments.shape else []
    print(json.dumps(JOBS[arguments.job](*given)))


if __name__ == "__main__":
    main()
