"""The report's measurements of the block: stages, dtypes, layouts, memory, host time, graphs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import providers, timing
from benchmarks.providers import PROVIDERS
from benchmarks.recorder import Context, Measurement
from benchmarks.roofline import floor_us
from benchmarks.rows import Case, make_row
from benchmarks.shapes import Shape
from benchmarks.workbench import Workbench

CHUNK_MIB = (16, 24, 33, 48, 64)  # of scratch memory; an H100 has 50 MB of L2
CHUNK_PASSES = ("inference", "fwd+bwd")
HOST_SHAPE = Shape("host", 4, 96, 14, 14)  # a few microseconds of device work: the host is slower


def timed(
    name: str,
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
        rows: list[dict[str, Any]] = []
        failures: dict[str, str] = {}
        context.so_far.update(rows=rows, failures=failures)
        bench = Workbench(shape, dtype, layout)
        try:
            with bench.active():
                for pass_ in passes:
                    usable, reasons = bench.usable(wanted, pass_)
                    failures.update({f"{who} {pass_}": why for who, why in reasons.items()})
                    measured = bench.gpu_times(usable, pass_)
                    for provider in usable:
                        case = Case(shape, dtype, layout, pass_, provider)
                        rows.append(make_row(case, bench, measured, ceilings))
        finally:
            bench.close()
        return context.so_far

    return Measurement(name, run, seconds=seconds)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Let the fused block take scratch memory of so many bytes at a time."""
    from smlp_kernels.kernels import backward, mix, rows  # needs Triton

    def change(to: int) -> None:
        rows.CHUNK_BYTES = to
        mix.mix_plan.cache_clear()
        backward.backward_plan.cache_clear()

    before = rows.CHUNK_BYTES
    change(size)
    try:
        yield
    finally:
        change(before)


def chunks(shape: Shape) -> Measurement:
    """GPU time of the fused block with chunks of several sizes: what the L2 cache holds."""

    def run(context: Context) -> dict[str, Any]:
        ceilings = context.measured_ceilings()
        floors = {pass_: floor_us(shape, pass_, "bf16", ceilings) for pass_ in CHUNK_PASSES}
        bench = Workbench(shape, "bf16", "channels_last")
        try:
            with bench.active():
                for mib in CHUNK_MIB:
                    with chunks_of(mib << 20):
                        times = {
                            pass_: bench.gpu_times([PROVIDERS["fused"]], pass_)["fused"].us
                            for pass_ in CHUNK_PASSES
                        }
                    context.so_far[f"{mib} MiB"] = {
                        pass_: {"us": us, "share_of_floor": floors[pass_] / us}
                        for pass_, us in times.items()
                    }
        finally:
            bench.close()
        return context.so_far

    return Measurement(f"chunks {shape.name}", run)


def memory(shape: Shape) -> Measurement:
    """Bytes kept for backward and peak of forward + backward: fused and eager, bf16, channels_last.

    Eager keeps most in channels_last too: the reference makes its permuted copies in any layout.
    """

    def run(context: Context) -> dict[str, Any]:
        for name in ("eager_nhwc", "fused"):
            context.so_far[name] = _memory_of(shape, name)
        return context.so_far

    return Measurement(f"memory {shape.name}", run)


def _memory_of(shape: Shape, name: str) -> dict[str, int | None]:
    bench = Workbench(shape, "bf16", "channels_last")
    try:
        with bench.active():
            forward = bench.steps(PROVIDERS[name], "fwd")[0]
            both = bench.steps(PROVIDERS[name], "fwd+bwd")[0]
            return {
                "kept": timing.saved_bytes(forward, list(bench.block.parameters())),
                "peak": timing.peak_bytes(both),
            }
    finally:
        bench.close()


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
    bench = Workbench(HOST_SHAPE, "bf16", "channels_last")
    try:
        with bench.active():
            x = bench.inputs("channels_last")[0][0]
            with torch.no_grad():
                empty = timing.host_us(lambda: EmptyFunction.apply(x))
            context.so_far["empty_function"] = empty
            for provider in providers.select(["eager_nhwc", "handwritten", "fused"]):
                context.so_far[provider.name] = {
                    pass_: timing.host_us(bench.steps(provider, pass_)[0])
                    for pass_ in ("inference", "fwd", "fwd+bwd")
                }
    finally:
        bench.close()
    return context.so_far


def graph_replay(context: Context) -> dict[str, Any]:
    """Replay a captured forward on other data: equal to a plain call, and how long each takes."""
    bench = Workbench(HOST_SHAPE, "bf16", "channels_last")
    try:
        with bench.active(), torch.no_grad():
            call = bench.call(PROVIDERS["fused"], backward=False)
            static_x, other_x = (
                pair[0].detach().clone() for pair in bench.inputs(bench.layout)[:2]
            )
            call(static_x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                static_y = call(static_x)
            static_x.copy_(other_x)
            graph.replay()
            equal = torch.equal(static_y, call(other_x))
            return {
                "failures": {} if equal else {"replay": "other values than those of a plain call"},
                "replay_us": timing.host_us(_synchronised(graph.replay), count=1),
                "call_us": timing.host_us(_synchronised(lambda: call(static_x)), count=1),
            }
    finally:
        bench.close()


def _synchronised(call: timing.Call) -> timing.Call:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
