"""The numbers of a row and the ratios of a group, by hand."""

import pytest
import torch

from benchmarks import rows
from benchmarks.providers import PROVIDERS
from benchmarks.roofline import Ceilings
from benchmarks.shapes import BY_NAME
from benchmarks.workbench import GpuTime, Workbench

SHAPE = BY_NAME["cifar-4"]  # weights [128, 384]; x is 128 * 128 * 16 elements
CEILINGS = Ceilings(1e12, {"bf16": 1e15}, "invented")
MEASURED = {"eager_nchw": GpuTime(60.0, 70.0, "graph", 63.0), "fused": GpuTime(20.0, 25.0, "graph")}


def _row(provider: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = Workbench(SHAPE, "bf16", "channels_last")
    bench.errors = bench.errors | {"fused": {"inference": {"output": 1e-3}}}
    return rows.make_row(bench, "inference", PROVIDERS[provider], MEASURED, CEILINGS)


def test_numbers_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _row("fused", monkeypatch)
    weights = 2 * (4 * 4 + 4) + 128 * 384 + 128
    floor = 1e6 * 2 * (2 * 128 * 128 * 16 + weights) / 1e12  # memory takes longer here
    assert row["floor_us"] == pytest.approx(floor)
    assert row["share_of_floor"] == pytest.approx(floor / 20)
    assert row["over_best_torch"] == pytest.approx(3.0)
    assert row["speedup_over"] == {"eager_nchw": pytest.approx(3.0)}
    assert row["errors"] == {"inference": {"output": 1e-3}} and row["noise"] is None
    assert row["group"] == f"inference {SHAPE} bf16 channels_last"
    assert _row("eager_nchw", monkeypatch)["noise"] == pytest.approx(0.05)


def test_a_row_has_nothing_of_passes_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench, fused = Workbench(SHAPE, "bf16", "channels_last"), PROVIDERS["fused"]
    row = rows.make_row(bench, "inference", fused, {}, None)
    bench.errors["fused"]["training"] = {"output": 1e-3}
    bench.compile_seconds["fused"]["training"] = 9.0
    assert row["errors"] == row["compile_seconds"] == {}


def test_rows_measured_apart_are_compared_again() -> None:
    fused = {"provider": "fused", "gpu_us": 20.0, "over_best_torch": 3.0}
    compiled = {"provider": "compiled", "gpu_us": 30.0}
    absent = {"provider": "handwritten"}
    compared = rows.with_ratios([fused, compiled, absent])
    assert compared[0]["over_best_torch"] == pytest.approx(1.5)
    assert compared[1]["speedup_over"] == {"fused": pytest.approx(20 / 30)}
    assert compared[2] == absent


def test_best_torch_leaves_the_fused_block_out() -> None:
    times = {"eager_nchw": 300.0, "compiled": 150.0, "fused": 60.0}
    assert rows.best_torch(times) == ("compiled", 150.0)
    assert rows.best_torch({"fused": 1.0}) is None
