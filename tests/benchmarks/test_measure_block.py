"""The report's measurements of the block on the processor, with a clock in the GPU's place."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import measure_block, providers, timing, workbench
from benchmarks.measure_block import EmptyFunction, host, memory, timed
from benchmarks.recorder import Context, OutOfTimeError, Recorder, SkippedError
from benchmarks.roofline import Ceilings, floor_us
from benchmarks.shapes import Shape
from benchmarks.workbench import GpuTime, Workbench
from smlp_kernels import ops
from smlp_kernels.kernels import rows

SHAPE = Shape("odd", 2, 6, 5, 7)
CEILINGS = Ceilings(1e9, {"bf16": 1e9, "fp32": 1e9}, "invented")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _context(ceilings: Ceilings | None = CEILINGS) -> Context:
    return Context(deadline=time.monotonic() + 60, ceilings=ceilings)


def test_rows_of_every_usable_provider_and_reasons_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []
    invented = {"eager_nchw": 20.0, "eager_nhwc": 10.0, "handwritten": 5.0}

    def gpu_times(self, usable, pass_):
        return {p.name: GpuTime(invented[p.name], 0.0, "invented") for p in usable}

    monkeypatch.setattr(Workbench, "gpu_times", gpu_times)
    monkeypatch.setattr(Workbench, "close", lambda self: closed.append(self.shape))
    passes = ("inference", "fwd+bwd")
    result = timed(SHAPE, passes, ["all"], dtype="fp32").run(_context())
    assert [(row["provider"], row["pass"], row["gpu_us"]) for row in result["rows"]] == [
        (name, pass_, us) for pass_ in passes for name, us in invented.items()
    ]
    assert result["rows"][0]["over_best_torch"] == pytest.approx(5 / 20)
    assert set(result["failures"]) == {
        f"{name} {pass_}"
        for name in ("compiled", "handwritten_compiled", "fused")
        for pass_ in passes
    }
    assert closed == [SHAPE]
    result = timed(SHAPE, ("inference",), ["eager_nhwc"], "fp32", "nchw").run(_context())
    assert result == {"rows": [], "failures": {}}


def test_rows_of_a_stage_that_is_cut_off_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gpu_times(self, usable, pass_):
        if pass_ == "fwd+bwd":
            raise OutOfTimeError("stopped after the 60 s that it had")
        return {p.name: GpuTime(10.0, 0.0, "invented") for p in usable}

    monkeypatch.setattr(Workbench, "gpu_times", gpu_times)
    monkeypatch.setattr(Workbench, "close", lambda self: None)
    stage = timed(SHAPE, ("inference", "fwd+bwd"), ["eager_nhwc"], dtype="fp32")
    recorder = Recorder(tmp_path)
    said: list[str] = []
    recorder.run([replace(stage, needs_gpu=False)], _context(), said.append)
    assert recorder.entries[stage.name]["status"] == "unfinished"
    assert [(row["pass"], row["gpu_us"]) for row in recorder.rows()] == [("inference", 10.0)]
    assert "  it had: 1 rows, failures {}" in said
    assert not recorder.measured(stage.name)  # so the next call measures it again


def test_without_ceilings_nothing_is_timed() -> None:
    with pytest.raises(SkippedError, match="no ceilings"):
        timed(SHAPE, ("fwd",), ["all"]).run(_context(ceilings=None))


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-written provider in the fused block's place: bf16 needs a GPU there."""
    stand_in = providers.Provider("fused", providers._handwritten)
    monkeypatch.setitem(providers.PROVIDERS, "fused", stand_in)
    monkeypatch.setattr(workbench, "check", lambda *_: {})


def test_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    monkeypatch.setattr(timing, "peak_bytes", lambda step: len(step()))
    result = memory(SHAPE).run(_context())
    x_bytes = 2 * SHAPE.elements
    assert result["eager_nhwc"]["kept"] >= 5 * x_bytes  # x, x permuted, concatenation
    assert x_bytes <= result["fused"]["kept"] < result["eager_nhwc"]["kept"]
    assert result["fused"]["peak"] == 7  # gradients: x, three weights, three biases


def test_host_time_of_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch)
    monkeypatch.setattr(measure_block, "HOST_SHAPE", SHAPE)
    monkeypatch.setattr(timing, "host_us", partial(timing.host_us, count=1, rounds=1))
    result = host(_context())
    assert set(result) == {"empty_function", "eager_nhwc", "handwritten", "fused"}
    assert set(result["fused"]) == {"inference", "fwd", "fwd+bwd"}


def test_empty_function_changes_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    y = EmptyFunction.apply(x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, torch.ones(3))[0], torch.ones(3))


def test_chunks_of_several_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def gpu_times(bench, wanted, pass_):
        assert ops.run_hopper is None  # it takes no chunks
        sizes.append(rows.CHUNK_BYTES // 1_000_000)
        return {one.name: GpuTime(20.0, 25.0, "graph", 21.0) for one in wanted}

    before = rows.CHUNK_BYTES, ops.run_hopper
    monkeypatch.setattr(Workbench, "gpu_times", gpu_times)
    found = measure_block.chunks(SHAPE).run(_context())
    assert before == (rows.CHUNK_BYTES, ops.run_hopper)
    assert sizes == [size for size in measure_block.CHUNK_MB for _ in measure_block.CHUNK_PASSES]
    assert found.keys() == {f"{megabytes} MB" for megabytes in measure_block.CHUNK_MB}
    floor = floor_us(SHAPE, "inference", "bf16", CEILINGS)
    share = found["16 MB"]["inference"]["share_of_floor"]
    assert share == pytest.approx(floor / 20)


def test_products_of_a_chunk() -> None:
    flops, calls = measure_block.products_of(Shape("small", 2, 6, 5, 4), "cpu")
    assert flops == 2 * (2 * 5 * 4) * 6 * 3 * 6
    y = calls["y"]()
    assert y.shape == (2 * 5 * 4, 6) and bool(torch.isfinite(y).all())
    assert calls["G"]().shape == (2 * 5 * 4, 3 * 6)
    assert calls["dF"]() is None
