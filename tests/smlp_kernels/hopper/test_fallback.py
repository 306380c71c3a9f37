"""The operator with the Hopper kernels on and off: who computes, and what is said."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from smlp_kernels import FusedSMLPBlock, env_report, fused_smlp, hopper, launch, ops, warmup
from smlp_kernels.hopper import binary_of
from tests.conftest import HAS_GPU
from tests.rehearsal import driver as rehearsal
from tests.smlp_kernels.hopper.stub import Driver, block
from tests.smlp_kernels.oracle import DEVICE


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """An H100, whose driver launches nothing of CUDA C++.

    Triton's kernels run as they do without it: in its interpreter, or on the GPU there is.
    """
    for module in (env_report, launch, ops):
        monkeypatch.setattr(module, "arch_of", lambda x: 90)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    if not HAS_GPU:
        monkeypatch.setattr(triton.runtime.driver, "_active", rehearsal.Driver(90))
    hopper.warn_once.cache_clear()
    return Driver(monkeypatch)


def step(dtype: torch.dtype = torch.float16, channels: int = 16) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a block whose weights are frozen."""
    x, weights = block(2, 7, 7, channels, dtype, device=DEVICE)
    x.requires_grad_()
    y = fused_smlp(x, *weights)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def test_the_kernel_takes_forward_and_input_gradient(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.Call, "launch", lambda *_: pytest.fail("Triton's kernel ran"))
    y, dx = step()
    assert [name for name, *_ in driver.loads] == ["smlp_fp16_200", "smlp_fp16_200_t"]
    assert [given[1].data_ptr() for *_, given in driver.launches] == [y.data_ptr(), dx.data_ptr()]


def test_what_the_plan_declines_is_triton_s_without_a_word(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actual = step(channels=12)
    assert not driver.launches and not caplog.records
    monkeypatch.setattr(ops, "run_hopper", None)
    for value, expected in zip(actual, step(channels=12), strict=True):
        assert torch.equal(value, expected)


FAILURES_OF_BINARIES = (
    "import of _lzma halted",  # a Python without it
    "No such file",
)
FAILURES = (
    "no kernel image",
    "invalid argument",
    "bytes of registers",
    "before a CUDA graph",
    *FAILURES_OF_BINARIES,
    "has no attribute 'load_binary'",  # a Triton whose driver is another one
)


@pytest.mark.parametrize("failure", FAILURES)
def test_any_failure_is_triton_s_with_one_warning_a_reason(
    failure: str,
    driver: Driver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as off:
        off.setattr(ops, "run_hopper", None)
        expected = step()
    driver.failing = {"no kernel image": "load", "invalid argument": "launch"}.get(failure, "")
    driver.spilled = 2 * (failure == "bytes of registers")
    if failure == "before a CUDA graph":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if failure in FAILURES_OF_BINARIES:
        monkeypatch.setattr(hopper, "binary_of", binary_of)
    if "_lzma" in failure:
        monkeypatch.setitem(sys.modules, "_lzma", None)
        monkeypatch.delitem(sys.modules, "lzma")
    if failure == "No such file":
        monkeypatch.setattr(hopper, "TEXT", tmp_path / "no.xz")
    if "load_binary" in failure:
        del driver.utils.load_binary
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for value, right in zip(step(), expected, strict=True):
                assert torch.equal(value, right)
    messages = [record.getMessage() for record in caplog.records]
    assert all(failure in message for message in messages)
    assert len(set(messages)) == len(messages)
    # forward and gradient are two kernels, whose names are part of some reasons
    assert len(messages) == (2 if "smlp_fp16" in messages[0] else 1)
    assert not driver.launches


@pytest.mark.parametrize("failing", ["", "load"])
def test_warmup_loads_the_kernel(
    failing: str, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For the forward alone, as the weights learn; where it fails, the call says so."""
    driver.failing = failing
    model = FusedSMLPBlock(7, 7, 16, dtype=torch.float16, device=DEVICE)
    report = warmup(model, (2, 16, 7, 7), memory_format=torch.channels_last)
    assert report.kernels > 1  # Triton's, as before
    assert len(driver.loads) == (not failing) and not driver.launches
    assert not caplog.records


def test_env_report_loads_the_kernel(driver: Driver) -> None:
    x = torch.empty(1, 384, 14, 14, dtype=torch.bfloat16, device=DEVICE)
    assert env_report.hopper_path(x) == "smlp_bf16_200, loaded"
    assert [name for name, *_ in driver.loads] == ["smlp_bf16_200"]
    assert "for this size and type" in env_report.hopper_path(x[:, :3])
    driver.failing = "load"
    strips = torch.empty(1, 64, 28, 28, dtype=torch.bfloat16, device=DEVICE)
    assert "no kernel image" in env_report.hopper_path(strips)


def test_env_report_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 384, 14, 14, dtype=torch.bfloat16)
    assert "the compute capability is not 9.0" in env_report.hopper_path(x)
    monkeypatch.setattr(ops, "run_hopper", None)
    assert "SMLP_KERNELS_HOPPER=0 is set" in env_report.hopper_path(x)


@pytest.mark.parametrize("arch", [80, 100])
def test_other_chips_compare_one_number(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "arch_of", lambda x: arch)
    monkeypatch.setattr(ops, "run_hopper", lambda *_: pytest.fail("it was asked"))
    y, dx = step()
    assert y.isfinite().all() and dx.isfinite().all()


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("0", False), ("1", True)])
def test_on_unless_the_variable_is_0(value: str | None, expected: bool) -> None:
    code = "from smlp_kernels import ops; from smlp_kernels.kernels import narrow; "
    code += "print(ops.run_hopper is not None, narrow.ARCHS == (90,))"
    environment = {k: v for k, v in os.environ.items() if k != "SMLP_KERNELS_HOPPER"}
    if value is not None:
        environment["SMLP_KERNELS_HOPPER"] = value
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(expected)] * 2
