"""Loading and launching: what Triton's driver is given, and what it makes of that."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.nvidia import driver as nvidia

from smlp_kernels import hopper
from smlp_kernels.hopper import binary_of
from smlp_kernels.hopper.plan import call_of
from smlp_kernels.launch import Call
from tests.smlp_kernels.hopper.stub import Driver, block
from tools.hopper_ptx import shipped_ptx


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


@pytest.fixture
def call() -> Call:
    made = call_of(*block(5, 7, 7, 96), 132)
    assert made is not None
    return made


def test_launch(driver: Driver, call: Call) -> None:
    driver.device = 1
    assert hopper.launch(call) is None
    ((grid, stream, function, packed, given),) = driver.launches
    assert (grid, stream, function) == ((call.plan.programs, 1, 1), 101, 1001)
    assert packed == (12, 1, 232448)
    assert given[9:] == call.plan.integers
    assert all(a is b for a, b in zip(given[:9], call.tensors, strict=True))


def test_each_device_loads_once(driver: Driver, call: Call) -> None:
    for _ in range(2):
        for driver.device in (0, 1):
            assert hopper.launch(call) is None
            assert driver.launches[-1][1:3] == (100 + driver.device, 1000 + driver.device)
    assert driver.loads == [(call.plan.kernel, b"\x7fELF", 232448)] * 2
    assert len(driver.launches) == 4


def test_other_kernels_are_loaded_as_they_are_needed(driver: Driver, call: Call) -> None:
    other = call_of(*block(1, 28, 28, 64), 132)
    assert other is not None
    for one in (call, other, call):
        assert hopper.launch(one) is None
    assert [name for name, *_ in driver.loads] == [call.plan.kernel, other.plan.kernel]


def test_a_refused_kernel_stays_refused(driver: Driver, call: Call) -> None:
    driver.failing = "load"
    reason = hopper.launch(call)
    assert reason is not None and "no kernel image" in reason
    driver.failing = ""
    assert hopper.launch(call) == reason
    assert not driver.loads and not driver.launches
    driver.device = 1
    assert hopper.launch(call) is None  # another device is another matter


def test_a_failed_launch(driver: Driver, call: Call) -> None:
    driver.failing = "launch"
    assert "invalid argument" in str(hopper.launch(call))
    driver.failing = ""
    assert hopper.launch(call) is None  # it may have been this one call
    assert len(driver.loads) == 1


def test_spilled_registers_are_refused(driver: Driver, call: Call) -> None:
    driver.spilled = 2
    assert f"{call.plan.kernel} spills 8 bytes of registers" in str(hopper.launch(call))
    assert not driver.launches


def test_nothing_is_loaded_during_a_capture(
    driver: Driver, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capturing(state: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state)

    capturing(True)
    assert "not loaded before a CUDA graph was captured" in str(hopper.launch(call))
    assert not driver.loads
    capturing(False)
    assert hopper.launch(call) is None
    capturing(True)
    assert hopper.launch(call) is None  # what is loaded can be captured
    assert (len(driver.loads), len(driver.launches)) == (1, 2)


SCRIPT = """
import ctypes
import json
import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from smlp_kernels import hopper
from smlp_kernels.hopper.plan import call_of
from tests.smlp_kernels.hopper.stub import block

library = ctypes.CDLL("libcuda.so.1")

def value(name, kind=ctypes.c_int):
    return kind.in_dll(library, name)

call = call_of(*block(5, 7, 7, 96), 132)
value("count").value = len(call.tensors) + len(call.plan.integers)
driver = CudaDriver()
driver.get_current_device, driver.get_current_stream = lambda: 1, lambda device: 0x123456789A
triton.runtime.driver.set_active(driver)
torch.cuda.is_current_stream_capturing = lambda: False
hopper.binary_of = lambda kernel: b"\\x7fELF"

def launched(failing="", local_bytes=0):
    hopper.load.cache_clear()
    value("current", ctypes.c_size_t).value = 0
    for name in ("loads", "launches"):
        value(name).value = 0
    value("failing", ctypes.c_char * 64).value = failing.encode()
    value("local_bytes").value = local_bytes
    reasons = [hopper.launch(call) for _ in range(2)]
    return reasons, value("loads").value, value("launches").value

print(json.dumps({
    "failures": {name: launched(name) for name in FAILING},
    "spilled": launched(local_bytes=8),
    "launched": launched(),
    "kernel": [value("kernel", ctypes.c_char * 64).value.decode(), call.plan.kernel],
    "grid": [call.plan.programs, *value("dims", ctypes.c_uint * 7)],
    "shared": value("largest_shared").value,
    "handles": [value(name, ctypes.c_size_t).value for name in ("function", "stream")],
    "parameters": bytes(value("parameters", ctypes.c_ubyte * 140)).hex(),
    "integers": call.plan.integers,
    "tensors": [0 if t is None else t.data_ptr() for t in call.tensors],
}))
"""
FAILING = [
    "cuDevicePrimaryCtxRetain",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Triton's own driver, its C code, gives to a stand-in for the CUDA driver."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile a driver")
    folder = tmp_path_factory.mktemp("cuda")
    source, target = Path(__file__).with_name("libcuda.c"), folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", *(f"-I{path}" for path in nvidia.include_dirs)]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    script = SCRIPT.replace("FAILING", repr(FAILING))
    child = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_triton_s_driver_hands_over_what_the_kernel_takes(found: dict[str, Any]) -> None:
    assert found["launched"] == [[None, None], 1, 2]
    assert found["kernel"][0] == found["kernel"][1]
    programs, *dims = found["grid"]
    assert dims == [programs, 1, 1, 384, 1, 1, 232448]
    assert found["shared"] == 232448
    assert found["handles"] == [1011, 0x123456789A]  # of the second device
    raw = bytes.fromhex(found["parameters"])
    assert raw == struct.pack("9Q17i", *found["tensors"], *found["integers"])
    assert found["tensors"][8] == 0  # there is no bias map


@pytest.mark.parametrize("failing", FAILING)
def test_what_fails_in_the_cuda_driver_is_a_reason(failing: str, found: dict[str, Any]) -> None:
    (first, second), _, launches = found["failures"][failing]
    assert failing in first and first == second and launches == 0


def test_spilled_registers_in_the_cuda_driver(found: dict[str, Any]) -> None:
    (reason, _), loads, launches = found["spilled"]
    assert "spills 8 bytes of registers" in reason and (loads, launches) == (1, 0)


class TestBinary:
    """Machine code, kept in Triton's cache."""

    KERNEL = "smlp_bf16_200"

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def assembled(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """The command of each run of an assembler."""
        run, noted = subprocess.run, []

        def note(command: list[str], **options: Any) -> Any:
            if "-arch=sm_90a" in command:
                noted.append(command)
            return run(command, **options)

        monkeypatch.setattr(subprocess, "run", note)
        return noted

    def test_is_assembled_once(self, assembled: list[list[str]], cache: Path) -> None:
        binary = binary_of(self.KERNEL)
        assert binary[:4] == b"\x7fELF"
        assert binary_of(self.KERNEL) == binary
        assert len(assembled) == 1
        assert [path.read_bytes() for path in cache.rglob("*.cubin")] == [binary]

    def test_is_that_of_the_text_which_is_executed(self, tmp_path: Path) -> None:
        """Of all kernels the one that is wanted, as without the others: tests/ptx runs that."""
        (tmp_path / "one.ptx").write_text(shipped_ptx(self.KERNEL))
        command = [triton.knobs.nvidia.ptxas.path, *hopper.OPTIONS, "one.ptx", "-o", "one.cubin"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert binary_of(self.KERNEL) == (tmp_path / "one.cubin").read_bytes()
        assert binary_of(self.KERNEL + "_t") != binary_of(self.KERNEL)

    def test_by_another_assembler_is_another(
        self, assembled: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = triton.knobs.nvidia.ptxas.path
        for version in ("12.8", "13.0"):
            use_assembler(monkeypatch, SimpleNamespace(path=path, version=version))
            binary_of(self.KERNEL)
        assert len(assembled) == 2

    @pytest.mark.parametrize("assembler", ["missing", "too old", "no program"])
    def test_without_an_assembler_that_works_there_is_no_kernel(
        self, assembler: str, tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tool = tmp_path / "ptxas"
        tool.write_text("#!/bin/sh\nexit 255\n")
        tool.chmod(0o755 if assembler == "too old" else 0o644)
        stand_in = SimpleNamespace(path=str(tool), version="11.0")
        use_assembler(monkeypatch, None if assembler == "missing" else stand_in)
        monkeypatch.setattr(hopper, "binary_of", binary_of)
        reasons = {"missing": "Cannot find ptxas", "too old": "Error(255", "no program": "denied"}
        assert reasons[assembler] in str(hopper.load(self.KERNEL, 0))
        assert not driver.loads


def use_assembler(monkeypatch: pytest.MonkeyPatch, tool: SimpleNamespace | None) -> None:
    """In the place of Triton's; None: Triton has none."""

    class Knobs:
        @property
        def ptxas(self) -> SimpleNamespace:
            if tool is None:
                raise RuntimeError("Cannot find ptxas")
            return tool

    monkeypatch.setattr(hopper, "knobs", SimpleNamespace(nvidia=Knobs()))
