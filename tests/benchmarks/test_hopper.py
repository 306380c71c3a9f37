"""The Hopper kernel's measurements: which stages, and that no other kernel is taken for it."""

import subprocess
import sys

import pytest

from benchmarks import hopper as measure
from benchmarks.shapes import STAGES
from smlp_kernels import hopper
from smlp_kernels.hopper.plan import call_of
from tests.smlp_kernels.hopper.stub import block


def test_the_stages_are_those_that_a_plan_takes() -> None:
    for shape in STAGES:
        taken = call_of(*block(1, shape.height, shape.width, shape.channels), 132) is not None
        assert (shape in measure.TAKEN) == taken


def test_what_is_watched_is_taken_in_both_directions() -> None:
    for shape in measure.ONCE:
        size = (shape.batch, shape.height, shape.width, shape.channels)
        x, weights = block(*size)
        assert call_of(x, weights, 132) and call_of(x, weights.transposed(), 132)


def test_another_machine_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.hopper", "once"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert "the Hopper kernel needs a GPU of compute capability 9.0" in child.stderr


def test_a_kernel_that_does_not_run_is_no_time_of_triton_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    x, weights = block(2, 7, 7, 12)
    with pytest.raises(RuntimeError, match="the Hopper kernel did not run"):
        measure.hopper_mix(x, weights)
