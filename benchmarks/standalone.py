"""Run a job that needs a new process: compiling, forwards to profile, first calls.

python -m benchmarks.standalone compile small-56
python -m benchmarks.standalone compile-stages
python -m benchmarks.standalone forward small-56   # or training
python -m benchmarks.standalone first-calls small-14
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from benchmarks.shapes import BY_NAME, DTYPES, LAYOUTS, STAGES, VARIANTS  # nothing loads Triton

PROFILED_CALLS = 8


def compile_kernels(name: str) -> None:
    """A fused forward and backward in each of ``VARIANTS``; Triton keeps what it compiles."""
    from benchmarks.roofline import matmul_precision
    from smlp_kernels import FusedSMLPBlock

    device, shape = "cuda" if torch.cuda.is_available() else "cpu", BY_NAME[name]
    for dtype, layout in VARIANTS:
        block = FusedSMLPBlock(
            shape.height, shape.width, shape.channels, device=device, dtype=DTYPES[dtype]
        )
        x = torch.randn(shape.size, device=device, dtype=DTYPES[dtype])
        x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        with matmul_precision(dtype):
            y = block(x)
            torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))


def compile_stages() -> None:
    """:func:`compile_kernels` for all stages, in several processes.

    Compiling dozens of kernels one after the other would take longer than all measurements.
    """
    processes = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        jobs = {shape.name: pool.submit(compile_kernels, shape.name) for shape in STAGES}
    failed = [f"FAILED {name}: {error}" for name, job in jobs.items() if (error := job.exception())]
    if failed:
        sys.exit("\n".join(failed))
    print(json.dumps({"compiled": list(jobs)}))


def profiled(name: str, pass_: str = "inference") -> None:
    """Warm up, then run PROFILED_CALLS of the fused block between cudaProfilerStart and Stop.

    The inputs rotate over more bytes than the L2 holds, so that in the steady state every call
    reads its input from DRAM, and what a call leaves dirty in the L2 is made up for by what it
    evicts of the calls before.
    """
    from benchmarks.providers import PROVIDERS
    from benchmarks.roofline import io_bytes
    from benchmarks.workbench import open_workbench

    fused = [PROVIDERS["fused"]]
    with open_workbench(BY_NAME[name], "bf16", "channels_last", pass_, fused) as bench:
        steps = bench.steps("fused")
        kept = [None] * (len(steps) + 1)  # outputs go to different addresses as well
        for index in range(2 * len(steps)):
            kept[index % len(kept)] = steps[index % len(steps)]()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for index in range(PROFILED_CALLS):
            kept[index % len(kept)] = steps[index % len(steps)]()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(json.dumps({"calls": PROFILED_CALLS, "ideal": io_bytes(bench.shape, "fwd", "bf16")}))


def first_call(name: str) -> dict[str, float]:
    """Seconds of the import and of the first forward and backward of a fused block.

    CUDA is initialised before the clock starts: that cost is torch's, not the kernels'.
    """
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", BY_NAME[name]
    x = torch.randn(shape.size, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.autograd.grad((x @ x.transpose(2, 3)).sum(), x)  # handles and the autograd thread
    clock = [time.perf_counter()]
    from smlp_kernels import FusedSMLPBlock

    clock.append(time.perf_counter())
    from benchmarks.timing import synchronised_seconds

    block = FusedSMLPBlock(shape.height, shape.width, shape.channels, device=device)
    block.bfloat16()
    clock.append(synchronised_seconds())
    y = block(x)
    clock.append(synchronised_seconds())
    torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
    clock.append(synchronised_seconds())
    seconds = [after - before for before, after in itertools.pairwise(clock)]
    return dict(zip(("import", "constructor", "forward", "backward"), seconds, strict=True))


def first_calls(name: str) -> None:
    """:func:`first_call` in a new process: Triton's cache empty, then filled by the first."""
    with tempfile.TemporaryDirectory(prefix="smlp-triton-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for cache in ("cold", "warm"):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                print(json.dumps({cache: pool.submit(first_call, name).result()}), flush=True)


JOBS: dict[str, Callable[..., None]] = {
    "compile": compile_kernels,
    "compile-stages": compile_stages,
    "forward": profiled,
    "training": partial(profiled, pass_="fwd+bwd"),
    "first-calls": first_calls,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("shape", nargs="?", choices=sorted(BY_NAME), help="not for compile-stages")
    arguments = parser.parse_args()
    if (arguments.job == "compile-stages") != (arguments.shape is None):
        parser.error("shape: expected for every job but compile-stages")
    JOBS[arguments.job](*filter(None, [arguments.shape]))


if __name__ == "__main__":
    main()
