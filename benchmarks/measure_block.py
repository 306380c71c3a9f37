"""The report's measurements of the block: stages, dtypes, layouts, memory, host time, graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import providers, timing
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.recorder import Context, Measurement
from benchmarks.roofline import floor_us
from benchmarks.rows import Case, make_row
from benchmarks.shapes import Shape
from benchmarks.workbench import Workbench

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


def tiles(shape: Shape) -> Measurement:
    """GPU time of a fused forward with each of :func:`benchmarks.tiles.variants`."""

    def run(context: Context) -> dict[str, Any]:
        from benchmarks.tiles import variants, with_tile  # needs Triton

        floor = floor_us(shape, "inference", "bf16", context.measured_ceilings())
        major, minor = torch.cuda.get_device_capability()
        named = variants(shape, 10 * major + minor)
        bench = Workbench(shape, "bf16", "channels_last")
        try:
            with bench.active():
                usable, failures = bench.usable(
                    [
                        Provider(name, with_tile(tile), gpu_only=True)
                        for name, tile in named.items()
                    ],
                    "inference",
                )
                context.so_far["failures"] = failures
                for name, time in bench.gpu_times(usable, "inference").items():
                    context.so_far[name] = {
                        "us": time.us,
                        "again_us": time.again_us,
                        "share_of_floor": floor / time.us,
                        "tile": str(named[name]),
                    }
        finally:
            bench.close()
        return context.so_far

    return Measurement(f"tiles {shape.name}", run)


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
