"""Jobs for a process that has just started: compiling, forwards to profile, a first call::

python -m benchmarks.standalone compile small-56
python -m benchmarks.standalone forward small-56
python -m benchmarks.standalone first-call small-14
"""

import argparse
import json
import time

import torch

from benchmarks.shapes import BY_NAME, DTYPES, LAYOUTS, Shape  # nothing that loads Triton

# What the stages are measured in.
VARIANTS = (
    ("bf16", "channels_last"),
    ("tf32", "channels_last"),
    ("fp16", "channels_last"),
    ("bf16", "nchw"),
)

PROFILED_CALLS = 8


def forward(shape: Shape) -> None:
    """Warm up, then run PROFILED_CALLS fused forwards between cudaProfilerStart and Stop.

    The inputs rotate over more bytes than the L2 holds, so that in the steady state every call
    reads its input from DRAM, and what a call leaves dirty in the L2 is made up for by what it
    evicts of the calls before.
    """
    from benchmarks.providers import PROVIDERS
    from benchmarks.workbench import open_workbench

    with open_workbench(shape, "bf16", "channels_last") as bench:
        steps = bench.steps(PROVIDERS["fused"], "inference")
        kept = [None] * (len(steps) + 1)  # outputs go to different addresses as well
        for index in range(2 * len(steps)):
            kept[index % len(kept)] = steps[index % len(steps)]()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for index in range(PROFILED_CALLS):
            kept[index % len(kept)] = steps[index % len(steps)]()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def compile_kernels(shape: Shape) -> None:
    """A fused forward and backward in each of ``VARIANTS``.

    For what they leave in Triton's cache.
    """
    from benchmarks.roofline import matmul_precision
    from smlp_kernels import FusedSMLPBlock

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype, layout in VARIANTS:
        block = FusedSMLPBlock(
            shape.height, shape.width, shape.channels, device=device, dtype=DTYPES[dtype]
        )
        x = torch.randn(shape.size, device=device, dtype=DTYPES[dtype])
        x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        with matmul_precision(dtype):
            y = block(x)
            torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))


def first_call(shape: Shape) -> dict[str, float]:
    """Seconds of the import and of the first and second forward + backward of a fused block.

    CUDA is initialised before the clock starts: that cost is torch's, not the kernels'.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(shape.size, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.autograd.grad((x @ x.transpose(2, 3)).sum(), x)  # handles and the autograd thread
    seconds = {}
    start = time.perf_counter()
    from smlp_kernels import FusedSMLPBlock

    seconds["import"] = time.perf_counter() - start
    from benchmarks.timing import synchronised_seconds

    block = FusedSMLPBlock(shape.height, shape.width, shape.channels, device=device)
    block.bfloat16()
    for name in ("first", "second"):
        start = synchronised_seconds()
        y = block(x)
        between = synchronised_seconds()
        torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
        seconds[f"{name} forward"] = between - start
        seconds[f"{name} backward"] = synchronised_seconds() - between
    return seconds


JOBS = {"compile": compile_kernels, "forward": forward, "first-call": first_call}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("shape", choices=sorted(BY_NAME))
    arguments = parser.parse_args()
    print(json.dumps(JOBS[arguments.job](BY_NAME[arguments.shape])))


if __name__ == "__main__":
    main()
