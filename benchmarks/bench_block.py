"""The block: provider x pass x shape x dtype x layout, grouped by everything but the provider.

Two clocks. pytest-benchmark's own statistics are the latency a user sees: synchronised before and
after, the L2 flushed in between. ``extra_info["gpu_us"]`` is the time on the device, measured with
all providers of a group in turn; shares of the floor and ratios are of this one.

Choose a part of it, for instance::

    pytest benchmarks --benchmark-only --shapes=small --providers=eager_nhwc,fused --passes=fwd
"""

from typing import Any

import pytest
import torch

from benchmarks import providers, shapes, timing
from benchmarks.conftest import chosen, runnable
from benchmarks.providers import Provider
from benchmarks.roofline import Ceilings
from benchmarks.rows import make_row
from benchmarks.workbench import CompileBudgetError, GpuTime, Workbench

ROUNDS, WARMUP_ROUNDS = (20, 3) if torch.cuda.is_available() else (3, 1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The chosen benchmarks, those that share a workbench next to each other."""
    config = metafunc.config
    benches = [
        pytest.param((shape, dtype, layout), id=f"{shape.name}-{dtype}-{layout}")
        for shape in shapes.select(chosen(config, "shapes"))
        for dtype in chosen(config, "dtypes")
        for layout in chosen(config, "layouts")
    ]
    metafunc.parametrize("bench", benches, indirect=True, scope="session")
    metafunc.parametrize("pass_", chosen(config, "passes"))
    metafunc.parametrize("provider", runnable(config), ids=lambda provider: provider.name)


@pytest.mark.benchmark(timer=timing.synchronised_seconds)
def test_block(
    benchmark: Any,
    bench: Workbench,
    pass_: str,
    provider: Provider,
    ceilings: Ceilings | None,
    flush: timing.Step,
    pytestconfig: pytest.Config,
) -> None:
    if reason := provider.why_not(bench.layout):
        pytest.skip(reason)
    try:
        step = bench.steps(provider, pass_)[0]
    except CompileBudgetError as reason:
        pytest.skip(str(reason))
    competitors = providers.select(chosen(pytestconfig, "providers"))
    info = {
        **make_row(bench, pass_, provider, gpu_times(bench, pass_, competitors), ceilings),
        **_memory(bench, pass_, provider, step),
        "host_us": timing.host_us(step, count=20 if bench.device == "cuda" else 1),
    }
    benchmark.extra_info.update(info)
    benchmark.group = info["group"]
    benchmark.pedantic(step, setup=flush, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)


def gpu_times(bench: Workbench, pass_: str, competitors: list[Provider]) -> dict[str, GpuTime]:
    """GPU times of all providers of a group, measured together when first asked for."""
    if bench.device != "cuda":
        return {}
    if pass_ not in bench.measured:
        usable, _ = bench.usable(competitors, pass_)  # the others' own benchmarks say why
        bench.measured[pass_] = bench.gpu_times(usable, pass_)
    return bench.measured[pass_]


def _memory(bench: Workbench, pass_: str, provider: Provider, step: timing.Step) -> dict[str, Any]:
    """Peak beyond what was allocated before, and what a forward keeps for its backward."""
    peak = timing.peak_bytes(step)
    memory: dict[str, Any] = {"peak_mb": None if peak is None else peak / 1e6}
    if pass_ == "fwd" and not provider.compiled:
        memory["kept_mb"] = timing.saved_bytes(step, list(bench.block.parameters())) / 1e6
    return memory
