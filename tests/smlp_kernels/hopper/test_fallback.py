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
from smlp_kernels.hopper import driver as loader
from tests.conftest import HAS_GPU
from tests.rehearsal.driver import Driver
from tests.smlp_kernels.hopper.stub import Stub, block, needs_gcc
from tests.smlp_kernels.oracle import DEVICE

FILL = 7.0


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """An H100, whose driver launches nothing of CUDA C++.

    Triton's kernels run as they do without it: in its interpreter, or on the GPU there is.
    """
    made = Stub(tmp_path)
    for module in (hopper, launch, ops):
        monkeypatch.setattr(module, "arch_of", lambda x: 90)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(hopper, "cuda_driver", lambda: made.driver)
    monkeypatch.setattr(loader, "binary_of", lambda *_: b".version 8.0\n")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    if not HAS_GPU:
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(90))
    hopper.warn_once.cache_clear()
    return made


def step(dtype: torch.dtype = torch.float16, channels: int = 16) -> tuple[Tensor, Tensor]:
    """Output and input gradient of a block whose weights are frozen."""
    x, weights = block(2, 7, 7, channels, dtype, device=DEVICE)
    x.requires_grad_()
    y = fused_smlp(x, *weights)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


@needs_gcc
def test_the_kernel_takes_forward_and_input_gradient(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.Call, "launch", lambda *_: pytest.fail("Triton's kernel ran"))
    kernels = []
    run = stub.driver.launch

    def note(call, *where) -> None:
        kernels.append(call.plan.kernel)
        call.tensors[1].fill_(FILL)
        run(call, *where)

    monkeypatch.setattr(stub.driver, "launch", note)
    y, dx = step()
    assert kernels == ["smlp_fp16_200", "smlp_fp16_200_t"]
    assert stub.integer("launches") == 2
    assert (y == FILL).all() and (dx == FILL).all()


@needs_gcc
def test_what_the_plan_declines_is_triton_s_without_a_word(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    actual = step(channels=12)
    assert stub.integer("launches") == 0 and not caplog.records
    monkeypatch.setattr(ops, "run_hopper", None)
    for value, expected in zip(actual, step(channels=12), strict=True):
        assert torch.equal(value, expected)


FAILURES = {
    "cuModuleLoadData": b"cuModuleLoadData",
    "cuLaunchKernel": b"cuLaunchKernel",
    "bytes of registers": b"",
    "before a CUDA graph": b"",
    "libnone": b"",
    "import of _lzma halted": b"",  # a Python without it
    "No such file": b"",
}


@needs_gcc
@pytest.mark.parametrize("failure", FAILURES)
def test_any_failure_is_triton_s_with_one_warning_a_reason(
    failure: str,
    stub: Stub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as off:
        off.setattr(ops, "run_hopper", None)
        expected = step()
    stub.set(failing=FAILURES[failure], failing_with=999, local_bytes=8 * ("registers" in failure))
    if failure == "before a CUDA graph":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if failure == "libnone":
        monkeypatch.setattr(hopper, "cuda_driver", lambda: loader.Driver("libnone.so"))
    if "_lzma" in failure:
        monkeypatch.setattr(loader, "binary_of", loader.ptx_of)
        monkeypatch.setitem(sys.modules, "_lzma", None)
        monkeypatch.delitem(sys.modules, "lzma")
    if failure == "No such file":
        monkeypatch.setattr(
            loader, "binary_of", lambda name: loader.ptx_of(name, tmp_path / "no.xz")
        )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for value, right in zip(step(), expected, strict=True):
                assert torch.equal(value, right)
    messages = [record.getMessage() for record in caplog.records]
    assert all(failure in message for message in messages)
    assert len(set(messages)) == len(messages)
    # forward and gradient are two kernels, whose names are part of some reasons
    assert len(messages) == (2 if "smlp_fp16" in messages[0] else 1)
    assert stub.integer("launches") == 0


@needs_gcc
@pytest.mark.parametrize("failing", [b"", b"cuModuleLoadData"])
def test_warmup_loads_the_kernel(
    failing: bytes, stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For the forward alone, as the weights learn; where it fails, the call says so."""
    stub.set(failing=failing, failing_with=999)
    model = FusedSMLPBlock(7, 7, 16, dtype=torch.float16, device=DEVICE)
    report = warmup(model, (2, 16, 7, 7), memory_format=torch.channels_last)
    assert report.kernels > 1  # Triton's, as before
    assert stub.integer("loads") == (not failing) and stub.integer("launches") == 0
    assert not caplog.records


@needs_gcc
def test_env_report_loads_the_kernel(stub: Stub) -> None:
    x = torch.empty(1, 384, 14, 14, dtype=torch.bfloat16, device=DEVICE)
    assert env_report.hopper_path(x) == "smlp_bf16_200, loaded"
    assert stub.integer("loads") == 1
    assert "for this size and type" in env_report.hopper_path(x[:, :3])
    stub.set(failing=b"cuFuncGetAttribute", failing_with=1)
    strips = torch.empty(1, 64, 28, 28, dtype=torch.bfloat16, device=DEVICE)
    assert "cuFuncGetAttribute returned 1" in env_report.hopper_path(strips)


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
    code = "from smlp_kernels import ops; print(ops.run_hopper is not None)"
    environment = {k: v for k, v in os.environ.items() if k != "SMLP_KERNELS_HOPPER"}
    if value is not None:
        environment["SMLP_KERNELS_HOPPER"] = value
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(expected)
