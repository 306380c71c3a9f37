"""The report's measurements of the block: stages, dtypes, layouts, memory, host time, graphs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import providers, timing
from benchmarks.providers import PROVIDERS
from benchmarks.recorder import Context, Measurement
from benchmarks.roofline import floor_us
from benchmarks.rows import make_row
from benchmarks.shapes import STAGES, Shape
from benchmarks.workbench import open_workbench
from smlp_kernels import ops
from smlp_kernels.kernels import backward, mix, rows
from smlp_kernels.kernels.axis import matrix_columns
from smlp_kernels.kernels.products import add_products, parts_of

CHUNK_MB = (16, 24, 32, 48, 64)  # of scratch memory; an H100 has 50 MB of L2
CHUNK_PASSES = ("inference", "fwd+bwd")
HOST_SHAPE = Shape("host", 4, 96, 14, 14)  # a few microseconds of device work: the host is slower


def timed(
    shape: Shape,
    passes: Sequence[str],
    names: Sequence[str],
    dtype: str = "bf16",
    layout: str = "channels_last",
    seconds: float = 60.0,
) -> Measurement:
    """GPU time of some providers on one shape, as rows like those of ``pytest benchmarks``.

    Those that do not suit the layout are left out; any other that cannot be timed is a failure.
    """
    wanted = [provider for provider in providers.select(list(names)) if provider.suits(layout)]

    def run(context: Context) -> dict[str, Any]:
        ceilings = context.measured_ceilings()
        measured_rows = context.so_far.setdefault("rows", [])
        failures = context.so_far.setdefault("failures", {})
        with open_workbench(shape, dtype, layout) as bench:
            for pass_ in passes:
                usable, reasons = bench.usable(wanted, pass_)
                failures.update({f"{who} {pass_}": why for who, why in reasons.items()})
                measured = bench.gpu_times(usable, pass_)
                measured_rows += (make_row(bench, pass_, one, measured, ceilings) for one in usable)
        return context.so_far

    kind = "compiled " if any(provider.compiled for provider in wanted) else ""
    name = f"{kind}{shape.name} {dtype} {layout} {' '.join(passes)}"
    return Measurement(name, run, seconds=seconds)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Let fused blocks take so much scratch memory; the Hopper kernel, which takes none, is off."""

    def forget() -> None:
        mix.mix_plan.cache_clear()
        backward.backward_plan.cache_clear()

    with patch.object(rows, "CHUNK_BYTES", size), patch.object(ops, "run_hopper", None):
        try:
            forget()
            yield
        finally:
            forget()


def chunks(shape: Shape) -> Measurement:
    """GPU time of the fused block with chunks of several sizes: what the L2 cache holds."""

    def run(context: Context) -> dict[str, Any]:
        ceilings = context.measured_ceilings()
        floors = {pass_: floor_us(shape, pass_, "bf16", ceilings) for pass_ in CHUNK_PASSES}
        with open_workbench(shape, "bf16", "channels_last") as bench:
            for megabytes in CHUNK_MB:
                with chunks_of(megabytes * 1_000_000):
                    times = {
                        pass_: bench.gpu_times([PROVIDERS["fused"]], pass_)["fused"].us
                        for pass_ in CHUNK_PASSES
                    }
                context.so_far[f"{megabytes} MB"] = {
                    pass_: {"us": us, "share_of_floor": floors[pass_] / us}
                    for pass_, us in times.items()
                }
        return context.so_far

    return Measurement(f"chunks {shape.name}", run)


def products_of(shape: Shape, device: str) -> tuple[int, dict[str, timing.Step]]:
    """The products of a chunk of a bfloat16 block that PyTorch (cuBLAS) computes, on random data.

    One is the forward's, two are the backward's, of as many flops, which come first. If one of them
    is far from what the chip reaches on a large product, it is the next thing to replace.
    """
    columns, channels = matrix_columns(shape.channels), shape.channels
    pixels = shape.height * shape.width
    pixels *= rows.chunk_images(shape.batch, pixels * columns * 2)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    matrix, dy, y = random(pixels, columns), random(pixels, channels), random(pixels, channels)
    fuse, bias = random(channels, 3 * channels), random(channels)
    mixed = matrix[:, : 3 * channels]
    parts = parts_of(channels, columns, pixels)
    total = torch.empty(parts, channels, columns, device=device)
    left, right = (t.unflatten(0, (parts, -1)) for t in (dy, matrix))
    return 6 * pixels * channels**2, {
        "y": lambda: torch.addmm(bias, mixed, fuse.t(), out=y),
        "G": lambda: torch.mm(dy, fuse, out=mixed),
        "dF": lambda: add_products(total, left.mT, right, first=False),
    }


def products(context: Context) -> dict[str, Any]:
    """The products alone: microseconds of a chunk and TFLOP/s, at every stage."""
    for shape in STAGES:
        flops, calls = products_of(shape, "cuda")
        found = {}
        with torch.cuda.stream(torch.cuda.Stream()):  # a graph is never captured on the default one
            for name, call in calls.items():
                found[name] = timing.graph_stopwatch([call] * 4, timing.event_us(call))()
        context.so_far[shape.name] = {
            name: {"us": us, "tflops": flops / us / 1e6} for name, us in found.items()
        }
    return context.so_far


def memory(shape: Shape) -> Measurement:
    """Bytes kept for backward and peak of forward + backward: fused and eager, bf16, channels_last.

    Eager keeps most in channels_last too: the reference makes its permuted copies in any layout.
    """

    def run(context: Context) -> dict[str, Any]:
        for name in ("eager_nhwc", "fused"):
            with open_workbench(shape, "bf16", "channels_last") as bench:
                forward = bench.steps(PROVIDERS[name], "fwd")[0]
                both = bench.steps(PROVIDERS[name], "fwd+bwd")[0]
                context.so_far[name] = {
                    "kept": timing.saved_bytes(forward, list(bench.block.parameters())),
                    "peak": timing.peak_bytes(both),
                }
        return context.so_far

    return Measurement(f"memory {shape.name}", run)


class EmptyFunction(torch.autograd.Function):
    """Does nothing: what any custom function costs the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


def host(context: Context) -> dict[str, Any]:
    """Host microseconds to issue one call of each pass, and of an empty autograd.Function."""
    with open_workbench(HOST_SHAPE, "bf16", "channels_last") as bench:
        x = bench.inputs("channels_last")[0][0]
        with torch.no_grad():
            context.so_far["empty_function"] = timing.host_us(lambda: EmptyFunction.apply(x))
        for provider in providers.select(["eager_nhwc", "handwritten", "fused"]):
            context.so_far[provider.name] = {
                pass_: timing.host_us(bench.steps(provider, pass_)[0])
                for pass_ in ("inference", "fwd", "fwd+bwd")
            }
    return context.so_far


def graph_replay(context: Context) -> dict[str, Any]:
    """Replay a captured forward on other data: equal to a plain call, and how long each takes."""
    with open_workbench(HOST_SHAPE, "bf16", "channels_last") as bench, torch.no_grad():
        call = bench.call(PROVIDERS["fused"], backward=False)
        static_x, other_x = (pair[0].detach().clone() for pair in bench.inputs(bench.layout)[:2])
        call(static_x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            static_y = call(static_x)
        static_x.copy_(other_x)
        graph.replay()
        equal = torch.equal(static_y, call(other_x))
        clocks = {"replay_us": graph.replay, "call_us": lambda: call(static_x)}
        return {
            "failures": {} if equal else {"replay": "other values than those of a plain call"},
            **timing.interleaved({k: timing.wall_stopwatch(v) for k, v in clocks.items()}),
        }
