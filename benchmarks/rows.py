"""The record of one benchmark: a flat mapping, the same in every JSON and table."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.providers import Provider
from benchmarks.roofline import Ceilings, floor_us
from benchmarks.workbench import GpuTime, Workbench


def make_row(
    bench: Workbench,
    pass_: str,
    provider: Provider,
    measured: Mapping[str, GpuTime],
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """Identity, GPU time with share of the floor and ratios, errors and compilation.

    Args:
        bench: of the shape, dtype and layout.
        pass_: a name in :data:`benchmarks.roofline.PASSES`.
        provider: whose row it is.
        measured: GPU times of all providers of the group; empty without a GPU.
        ceilings: of this GPU; None without one.
    """
    shape = bench.shape
    row = {
        "group": f"{pass_} {shape} {bench.dtype} {bench.layout}",
        "provider": provider.name,
        "pass": pass_,
        "shape": shape.name,
        "size": list(shape.size),
        "dtype": bench.dtype,
        "layout": bench.layout,
        "errors": {**bench.errors[provider.name]},  # a later pass adds to the bench's own
        "compile_seconds": {**bench.compile_seconds[provider.name]},
    }
    mine = measured.get(provider.name)
    if mine is None or ceilings is None:
        return row
    floor = floor_us(shape, pass_, bench.dtype, ceilings)
    return {
        **row,
        "gpu_us": mine.us,
        "gpu_event_us": mine.event_us,
        "gpu_method": mine.method,
        "noise": None if mine.again_us is None else mine.again_us / mine.us - 1,
        "floor_us": floor,
        "share_of_floor": floor / mine.us,
        **_ratios({name: time.us for name, time in measured.items()}, provider.name),
    }


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one group with their ratios to each other, however they were measured."""
    all_us = {row["provider"]: row["gpu_us"] for row in rows if row.get("gpu_us") is not None}
    return [
        {**row, **_ratios(all_us, row["provider"])} if row["provider"] in all_us else row
        for row in rows
    ]


def best_torch(gpu_us: Mapping[str, float]) -> tuple[str, float] | None:
    """The fastest provider that is plain torch, with its time; None if none was measured."""
    of_torch = {name: us for name, us in gpu_us.items() if name != "fused"}
    return min(of_torch.items(), key=lambda item: item[1], default=None)


def _ratios(all_us: Mapping[str, float], name: str) -> dict[str, Any]:
    """How many times longer the best of torch takes than ``name``, and each of the others."""
    best = best_torch(all_us)
    return {
        "over_best_torch": best[1] / all_us[name] if best else None,
        "speedup_over": {other: us / all_us[name] for other, us in all_us.items() if other != name},
    }
