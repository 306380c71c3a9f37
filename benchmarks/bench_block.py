"""The block: provider x pass x shape x dtype x layout, grouped by everything but the provider.

Two clocks. pytest-benchmark's own statistics are the latency a user sees: synchronised before and
after, over inputs that rotate. ``extra_info["gpu_us"]`` is the time on the device, measured with
all providers of a group in turn; shares of the floor and ratios are of this one.
"""

import itertools
from typing import Any

import pytest
import torch

from benchmarks import shapes, timing
from benchmarks.conftest import chosen, runnable
from benchmarks.providers import Provider
from benchmarks.roofline import Ceilings, floor_us
from benchmarks.workbench import Workbench
from smlp.info import kept_storages

ROUNDS, WARMUP_ROUNDS = (20, 3) if torch.cuda.is_available() else (3, 1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The chosen benchmarks, those that share a workbench next to each other."""
    config = metafunc.config
    benches = [
        pytest.param((shape, dtype, layout, pass_), id=f"{shape.name}-{dtype}-{layout}-{pass_}")
        for shape in shapes.select(chosen(config, "shapes"))
        for dtype in chosen(config, "dtypes")
        for layout in chosen(config, "layouts")
        for pass_ in chosen(config, "passes")
    ]
    metafunc.parametrize("bench", benches, indirect=True)
    wanted = runnable(config, "channels_last")
    metafunc.parametrize("provider", wanted, ids=lambda provider: provider.name)


@pytest.mark.benchmark(timer=timing.synchronised_seconds)
def test_block(
    benchmark: Any, bench: Workbench, provider: Provider, ceilings: Ceilings | None
) -> None:
    if reason := provider.why_not(bench.layout):
        pytest.skip(reason)
    benchmark.extra_info.update(row(bench, provider, ceilings))
    benchmark.group = benchmark.extra_info["group"]
    rotating = itertools.cycle(bench.steps(provider.name))
    benchmark.pedantic(lambda: next(rotating)(), rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)


def row(bench: Workbench, provider: Provider, ceilings: Ceilings | None) -> dict[str, Any]:
    """Identity, errors, memory, host and GPU time, share of the floor; the same in every JSON."""
    shape, name = bench.shape, provider.name
    step = bench.steps(name)[0]
    peak, trains = timing.peak_bytes(step), bench.pass_ in ("fwd", "fwd+bwd")
    found = {
        "group": f"{bench.pass_} {shape} {bench.dtype} {bench.layout}",
        "provider": name,
        "pass": bench.pass_,
        "shape": shape.name,
        "size": list(shape.size),
        "dtype": bench.dtype,
        "layout": bench.layout,
        "errors": bench.errors[name],
        "compile_seconds": bench.compile_seconds.get(name),
        "host_us": timing.host_us(step, count=20 if bench.device == "cuda" else 1),
        "peak_mb": None if peak is None else peak / 1e6,
    }
    if trains and not provider.compiled:
        with kept_storages(bench.block.parameters()) as kept:  # x too, where it is kept
            step()
        found["kept_mb"] = sum(storage.nbytes() for storage in kept.values()) / 1e6
    if (measured := bench.gpu_us.get(name)) and ceilings:
        floor = floor_us(shape, bench.pass_, bench.dtype, ceilings)
        found |= {
            "gpu_us": measured.median,
            "spread": measured.spread,
            "floor_us": floor,
            "share_of_floor": floor / measured.median,
        }
    return found
