"""What is written down about one benchmark: a flat mapping, the same in every JSON and table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import providers
from benchmarks.roofline import Ceilings, floor_us
from benchmarks.shapes import Shape
from benchmarks.summary import best_torch, speedups
from benchmarks.workbench import GpuTime, Workbench


@dataclass(frozen=True)
class Case:
    """One benchmark."""

    shape: Shape
    dtype: str
    layout: str
    pass_: str
    provider: providers.Provider

    @property
    def group(self) -> str:
        return f"{self.pass_} {self.shape} {self.dtype} {self.layout}"

    def __str__(self) -> str:
        parts = (self.shape.name, self.dtype, self.layout, self.pass_, self.provider.name)
        return "-".join(parts)


def make_row(
    case: Case, bench: Workbench, measured: dict[str, GpuTime], ceilings: Ceilings | None
) -> dict[str, Any]:
    """Identity, GPU time with share of the floor and ratios, errors and compilation of a case."""
    shape = case.shape
    return {
        "group": case.group,
        "provider": case.provider.name,
        "pass": case.pass_,
        "shape": shape.name,
        "size": [shape.batch, shape.channels, shape.height, shape.width],
        "dtype": case.dtype,
        "layout": case.layout,
        **_device_numbers(case, measured, ceilings),
        "errors": _of(case.provider, bench.errors),
        "compile_seconds": _of(case.provider, bench.compile_seconds),
    }


def _device_numbers(
    case: Case, measured: dict[str, GpuTime], ceilings: Ceilings | None
) -> dict[str, Any]:
    """Numbers that take a GPU; nothing without one."""
    mine = measured.get(case.provider.name)
    if mine is None or ceilings is None:
        return {}
    floor = floor_us(case.shape, case.pass_, case.dtype, ceilings)
    return {
        "gpu_us": mine.us,
        "gpu_event_us": mine.event_us,
        "gpu_method": mine.method,
        "noise": None if mine.again_us is None else mine.again_us / mine.us - 1,
        "floor_us": floor,
        "share_of_floor": floor / mine.us,
        **_ratios({name: time.us for name, time in measured.items()}, case.provider.name),
    }


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one group with their ratios to each other, however they were measured."""
    all_us = {row["provider"]: row["gpu_us"] for row in rows if row.get("gpu_us") is not None}
    return [
        {**row, **_ratios(all_us, row["provider"])} if row["provider"] in all_us else row
        for row in rows
    ]


def _ratios(all_us: dict[str, float], name: str) -> dict[str, Any]:
    best = best_torch(all_us)
    return {
        "over_best_torch": best[1] / all_us[name] if best else None,
        "speedup_over": speedups(all_us, name),
    }


def _of(provider: providers.Provider, by_stage: dict[str, Any]) -> dict[str, Any]:
    """The entries of one provider, by stage (``inference``, ``training``)."""
    own = f"{provider.name} "
    return {key.removeprefix(own): value for key, value in by_stage.items() if key.startswith(own)}
