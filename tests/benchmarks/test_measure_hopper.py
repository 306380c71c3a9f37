"""The Hopper kernel's measurements: what is run where, what is read, and what its probes are."""

import subprocess
import sys
import time

import pytest
import torch

from benchmarks import measure_hopper, measure_process
from benchmarks.measure_hopper import PROBE, measurements
from benchmarks.recorder import Context, SkippedError
from benchmarks.shapes import STAGES
from smlp_kernels import hopper
from smlp_kernels.hopper.plan import call_of
from tests.smlp_kernels.hopper.stub import block
from tools import hopper_ptx


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Context:
    """On a GPU that the kernel is for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return Context(time.monotonic() + 60)


def answer(monkeypatch: pytest.MonkeyPatch, stdout: str, status: int = 0) -> list[tuple]:
    """Let every child print this; the list is of what each was called with."""
    called = []

    def run(command, seconds, extra_env) -> subprocess.CompletedProcess[str]:
        called.append((command, extra_env))
        return subprocess.CompletedProcess(command, status, stdout, "why it failed")

    monkeypatch.setattr(measure_process, "run_child", run)
    return called


def test_the_stages_are_those_that_a_plan_takes() -> None:
    names = [one.name for one in measurements()]
    for shape in STAGES:
        taken = call_of(*block(1, shape.height, shape.width, shape.channels), 132) is not None
        assert (f"Hopper kernel {shape.name}" in names) == taken
    assert names[-2:] == ["Hopper kernel racecheck", "Hopper kernel probes"]


@pytest.mark.parametrize("number", [0, -2, -1])
def test_another_gpu_is_skipped(
    number: int, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(SkippedError, match=r"needs compute capability 9\.0"):
        measurements()[number].run(context)


def test_a_child_answers_with_its_last_line(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = answer(monkeypatch, 'a warning\n{"us": {"forward Hopper": 30.0}}\n')
    assert measurements()[0].run(context) == {"us": {"forward Hopper": 30.0}}
    module = [sys.executable, "-m", "benchmarks.measure_hopper"]
    assert called == [([*module, "block", STAGES[0].name], None)]


def test_a_child_that_dies_is_a_failure_of_its_own(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, "", status=1)
    with pytest.raises(RuntimeError, match="ended with 1: why it failed"):
        measurements()[-1].run(context)


@pytest.mark.parametrize("hazards", [0, 3])
def test_racecheck(hazards: int, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "========= COMPUTE-SANITIZER\n========= Error: Race reported\n"
    tail = (
        f"========= RACECHECK SUMMARY: {hazards} hazards displayed ({hazards} errors, 0 warnings)"
    )
    called = answer(monkeypatch, head * bool(hazards) + tail)
    monkeypatch.setattr(measure_process.shutil, "which", lambda name: f"/bin/{name}")
    found = measurements()[-2].run(context)
    assert bool(found["failures"]) == bool(hazards)
    assert called[0][0][:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"]


def test_without_a_checker(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_process.shutil, "which", lambda name: None)
    with pytest.raises(SkippedError, match="compute-sanitizer is not on the PATH"):
        measurements()[-2].run(context)


def test_a_kernel_that_does_not_run_is_no_time_of_triton_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    x, weights = block(2, 7, 7, 12)
    with pytest.raises(RuntimeError, match="the Hopper kernel did not run"):
        measure_hopper.hopper_mix(x, weights)


def test_probes_are_given_what_they_take() -> None:
    text = hopper_ptx.shipped_ptx(hopper_ptx.PROBES)
    assert hopper_ptx.shipped(hopper_ptx.PROBES) == measure_hopper.PROBES
    assert text.count(f"_param_0[{PROBE.size}]") == text.count(".visible .entry probe_") == 6
    # a piece of what is copied is 16 bytes of each of 384 threads
    assert all(size % (384 * 16) == 0 for size in measure_hopper.COPY_BYTES.values())
