"""The search for tiles, with times that are made up; tests/rehearsal runs it to its end."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.timing import Samples
from benchmarks.workbench import WrongResultError
from smlp_kernels import ops
from smlp_kernels.kernels import narrow
from smlp_kernels.kernels.tiles import AXIS_TABLE, AxisRow, axis_row
from smlp_kernels.table import set_rows
from tools import aot, tune
from tools.tune import main, shape_of

ARGUMENTS = ["--shape", "2,16,28,8"]  # 32 and 16 positions
GPU = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="a GPU")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[AxisRow]]:
    """One with a GPU; the table is put back after each test."""
    rows = list(AXIS_TABLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: GPU)
    for module, name in ((ops, "run_hopper"), (narrow, "ARCHS")):  # are switched off: restored
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield rows
    set_rows(rows)


def stand_in(monkeypatch: pytest.MonkeyPatch, time: Any) -> list[tuple[str, AxisRow, AxisRow]]:
    """Let passes take ``time(pass, row along H, row along W)``; which were timed.

    Kernels of eight warps spill in their loops.
    """
    timed = []

    def compile_call(call: Any, arch: int) -> aot.Resources:
        spills = 2 * (call.plan.num_warps == 8)
        return aot.Resources(128, 0, spills, 0, 0, 1024, 0, False, Counter())

    class Bench:
        def __init__(self, pass_: str) -> None:
            self.pass_ = pass_

        def steps(self, name: str) -> None:
            if axis_row(28, torch.bfloat16, 90, self.pass_ == "inference").columns == 256:
                raise WrongResultError("y")

        @property
        def gpu_us(self) -> dict[str, Samples]:
            assert ops.run_hopper is None  # it has no tiles
            forward = self.pass_ == "inference"
            h, w = (axis_row(size, torch.bfloat16, 90, forward) for size in (28, 8))
            timed.append((self.pass_, h, w))
            return {"fused": Samples(time(self.pass_, h, w), 0.0)}

    def open_workbench(shape: Any, dtype: str, layout: str, pass_: str, providers: Any) -> Any:
        assert [provider.name for provider in providers] == ["fused"]
        return nullcontext(Bench(pass_))

    monkeypatch.setattr(aot, "compile_call", compile_call)
    monkeypatch.setattr(tune, "open_workbench", open_workbench)
    return timed


def test_the_fastest_rows_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the forward two warps and few programs along H win, in the backward few registers."""

    def time(pass_: str, h: AxisRow, w: AxisRow) -> float:
        if pass_ == "inference":
            return 100 * h.num_warps + h.programs / 132
        return 50 if w.registers == 128 and w.columns == 64 else 60

    timed = stand_in(monkeypatch, time)
    assert main(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(
        "2,16,28,8 [2, 16, 28, 8], bf16, a GPU, Triton " + tune.triton.__version__ + ":"
    )
    assert lines[start + 1 :] == [
        "AxisRow((90,), True, 2, 32, 32, 2, 264, None),  # forward: 202.0 us for 404.0",
        "AxisRow((90,), False, 2, 16, 64, 2, 792, 128),  # backward: 50.0 us for 60.0",
    ]
    searched = [line for line in lines[:start] if line]
    assert sum("as it is" in line for line in searched) == 4  # two passes, two axes
    refused = [line for line in searched if "num_warps=8" in line]
    assert refused and all("local-memory instructions in loops" in line for line in refused)
    assert not [rows for rows in timed if 8 in (rows[1].num_warps, rows[2].num_warps)]
    wrong = [line for line in searched if "positions=32, columns=256, num_warps=2" in line]
    assert wrong and all(line.endswith(": WrongResultError: y") for line in wrong)


def test_what_is_found_along_one_axis_holds_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = stand_in(monkeypatch, lambda pass_, h, w: 1.0 * w.num_warps + h.num_warps)
    main(ARGUMENTS)
    forward = [(h, w) for pass_, h, w in timed if pass_ == "inference"]
    shipped_h, shipped_w = forward[0]
    assert shipped_w.num_warps == 4
    assert {w.num_warps for h, w in forward if h != shipped_h} == {2}  # the shorter axis is first


def test_noise_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], machine: list[AxisRow]
) -> None:
    times = iter([100.0] + [99.0] * 10_000)
    stand_in(monkeypatch, lambda *_: next(times))
    assert main(ARGUMENTS) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no row is faster than those of the table"
    assert machine == AXIS_TABLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2,16,28", r"expected BATCH,C,H,W, got '2,16,28': not enough values"),
        ("2,16,0,28", r"expected BATCH,C,H,W, got '2,16,0,28': height: expected at least 1"),
        ("2,a,28,28", r"expected BATCH,C,H,W, got '2,a,28,28': invalid literal"),
        ("2,16,300,28", r"expected H and W up to 256, C up to 2048, got '2,16,300,28'"),
    ],
)
def test_wrong_shapes_are_refused(text: str, message: str) -> None:
    with pytest.raises(tune.argparse.ArgumentTypeError, match=message):
        shape_of(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((torch.cuda, "is_available", lambda: False), "an NVIDIA GPU is needed"),
        (
            (GPU, "minor", 3),
            "compute capability 9.3: add it to SHARED_MEMORY in tools/aot.py",
        ),
    ],
    ids=["no GPU", "unknown chip"],
)
def test_machines_that_cannot_be_tuned_are_told(
    change: tuple[Any, str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(*change)
    with pytest.raises(SystemExit):
        main(ARGUMENTS)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", tune.OTHER_WAYS)
def test_variables_that_lead_elsewhere_are_told(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit):
        main(ARGUMENTS)
    assert f"{name}: expected not to be set, got 1" in capsys.readouterr().err
