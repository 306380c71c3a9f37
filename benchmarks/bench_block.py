"""The block: provider x pass x shape x dtype x layout, grouped by everything but the provider.

Two clocks. pytest-benchmark's own statistics are the latency a user sees: synchronised before and
after, the L2 flushed in between. ``extra_info["gpu_us"]`` is the time on the device, measured with
all providers of a group in turn; shares of the floor and ratios are of this one.

Choose a part of it, for instance::

    pytest benchmarks --benchmark-only --shapes=small --providers=eager_nhwc,fused --passes=fwd
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import providers, shapes, timing
from benchmarks.conftest import WorkbenchSlot, chosen
from benchmarks.roofline import Ceilings
from benchmarks.rows import Case, make_row
from benchmarks.workbench import CompileBudgetError, GpuTime, Workbench

ROUNDS, WARMUP_ROUNDS = (20, 3) if torch.cuda.is_available() else (3, 1)


def cases(config: pytest.Config) -> Iterator[Case]:
    """The chosen benchmarks, those that share a workbench next to each other."""
    for shape in shapes.select(chosen(config, "shapes")):
        for dtype in chosen(config, "dtypes"):
            for layout in chosen(config, "layouts"):
                for pass_ in chosen(config, "passes"):
                    for provider in providers.select(chosen(config, "providers")):
                        yield Case(shape, dtype, layout, pass_, provider)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", list(cases(metafunc.config)), ids=str)


@pytest.mark.benchmark(timer=timing.synchronised_seconds)
def test_block(
    benchmark: Any,
    case: Case,
    slot: WorkbenchSlot,
    ceilings: Ceilings | None,
    flush: timing.L2Flush,
    rows: list[dict[str, Any]],
    pytestconfig: pytest.Config,
) -> None:
    if reason := case.provider.why_not(case.layout):
        pytest.skip(reason)
    bench = slot.get(case.shape, case.dtype, case.layout)
    with bench.active():
        try:
            step = bench.steps(case.provider, case.pass_)[0]
        except CompileBudgetError as reason:
            pytest.skip(str(reason))
        competitors = providers.select(chosen(pytestconfig, "providers"))
        info = {
            **make_row(case, bench, gpu_times(bench, case, competitors), ceilings),
            **_memory(bench, case, step),
            "host_us": timing.host_us(step, count=20 if bench.device == "cuda" else 1),
        }
        benchmark.extra_info.update(info)
        benchmark.group = case.group
        benchmark.pedantic(step, setup=flush, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    wall = benchmark.stats.stats.median if benchmark.stats else None
    rows.append({**info, "wall_us": None if wall is None else 1e6 * wall})


def gpu_times(
    bench: Workbench, case: Case, competitors: list[providers.Provider]
) -> dict[str, GpuTime]:
    """GPU times of all providers of the case's group, measured together when first asked for."""
    if bench.device != "cuda":
        return {}
    if case.pass_ not in bench.measured:
        usable, _ = bench.usable(competitors, case.pass_)  # the others' own benchmarks say why
        bench.measured[case.pass_] = bench.gpu_times(usable, case.pass_)
    return bench.measured[case.pass_]


def _memory(bench: Workbench, case: Case, step: Any) -> dict[str, Any]:
    """Peak beyond what was allocated before, and what a forward keeps for its backward."""
    peak = timing.peak_bytes(step)
    memory: dict[str, Any] = {"peak_mb": None if peak is None else peak / 1e6}
    if case.pass_ == "fwd" and not case.provider.compiled:
        memory["kept_mb"] = timing.saved_bytes(step, list(bench.block.parameters())) / 1e6
    return memory
