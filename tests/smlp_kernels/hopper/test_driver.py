"""Loading and launching, on a driver that notes what it is given, for two devices."""

import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from smlp_kernels.hopper import driver as module
from smlp_kernels.hopper.driver import UnavailableError, binary_of
from smlp_kernels.hopper.plan import Call, call_of
from tests.smlp_kernels.hopper.stub import Stub, block, needs_gcc

pytestmark = needs_gcc


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Without an assembler: the text is what is loaded."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "binary_of", lambda *_: b".version 8.0\n")
    return Stub(tmp_path)


@pytest.fixture
def call() -> Call:
    made = call_of(*block(5, 7, 7, 96), 132)
    assert made is not None
    return made


def test_launch(stub: Stub, call: Call) -> None:
    stub.driver.launch(call, 1, 0x123456789A)
    assert stub.integers("dims", 6) == [*call.plan.grid, 1, 384, 1, 1]
    assert stub.integer("shared_bytes") == stub.integer("largest_shared") == call.plan.shared
    assert stub.long("stream") == 0x123456789A
    assert stub.content("kernel", 32).rstrip(b"\0").decode() == call.plan.kernel
    raw = stub.content("parameters", 144)
    assert raw == call.parameters()
    assert struct.unpack_from("9Q", raw)[:2] == tuple(t.data_ptr() for t in call.tensors[:2])


def test_each_device_loads_once_and_runs_in_its_own_context(stub: Stub, call: Call) -> None:
    for _ in range(2):
        for device in (0, 1):
            stub.driver.launch(call, device, 0)
            assert stub.long("function") == 1010 + device
            assert stub.integer("depth") == 0  # the context of the caller is current again
    assert (stub.integer("loads"), stub.integer("launches")) == (2, 4)


def test_other_kernels_are_loaded_as_they_are_needed(stub: Stub, call: Call) -> None:
    other = call_of(*block(1, 28, 28, 64), 132)
    assert other is not None
    for one in (call, other, call):
        stub.driver.launch(one, 0, 0)
    assert stub.integer("loads") == 2


@pytest.mark.parametrize(
    "name",
    [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncGetAttribute",
        "cuFuncSetAttribute",
    ],
)
def test_a_refused_kernel_stays_refused(name: str, stub: Stub, call: Call) -> None:
    stub.set(failing=name.encode(), failing_with=98)
    with pytest.raises(UnavailableError, match=f"{name} returned 98"):
        stub.driver.launch(call, 0, 0)
    stub.set(failing=b"")
    loads = stub.integer("loads")
    with pytest.raises(UnavailableError, match=f"{name} returned 98"):
        stub.driver.launch(call, 0, 0)
    assert stub.integer("loads") == loads and stub.integer("depth") == 0
    stub.driver.launch(call, 1, 0)  # another device is another matter


def test_a_failed_launch(stub: Stub, call: Call) -> None:
    stub.set(failing=b"cuLaunchKernel", failing_with=701)
    with pytest.raises(UnavailableError, match="cuLaunchKernel returned 701"):
        stub.driver.launch(call, 0, 0)
    assert stub.integer("depth") == 0


def test_spilled_registers_are_refused(stub: Stub, call: Call) -> None:
    stub.set(local_bytes=8)
    with pytest.raises(UnavailableError, match=f"{call.plan.kernel} spills 8 bytes of registers"):
        stub.driver.launch(call, 0, 0)
    assert stub.integer("launches") == 0


def test_nothing_is_loaded_during_a_capture(
    stub: Stub, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnavailableError, match="not loaded before a CUDA graph was captured"):
        stub.driver.launch(call, 0, 0)
    assert stub.integer("loads") == 0
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(module, "binary_of", lambda *_: b".version 8.0\n")
    stub.driver.launch(call, 0, 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stub.driver.launch(call, 0, 0)  # what is loaded can be captured
    assert (stub.integer("loads"), stub.integer("launches")) == (1, 2)


def test_without_a_driver() -> None:
    with pytest.raises(UnavailableError, match=r"libnone\.so"):
        module.Driver("libnone.so")


class TestBinary:
    """Machine code, kept in Triton's cache; the text where there is no assembler that works."""

    KERNEL = "smlp_bf16_200"

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def assembled(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """A name of each file that an assembler is run for."""
        run, noted = subprocess.run, []

        def note(command: list[str], **options: Any) -> Any:
            if "-arch=sm_90a" in command:
                noted.append(Path(command[-1]).name)
            return run(command, **options)

        monkeypatch.setattr(subprocess, "run", note)
        return noted

    def test_is_assembled_once(self, assembled: list[str], cache: Path) -> None:
        binary = binary_of(self.KERNEL)
        assert binary[:4] == b"\x7fELF" and self.KERNEL.encode() in binary
        assert binary_of(self.KERNEL) == binary
        assert len(assembled) == 1
        assert [path.read_bytes() for path in cache.rglob("*.cubin")] == [binary]

    def test_by_another_assembler_is_another(
        self, assembled: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = triton.knobs.nvidia.ptxas.path
        for version in ("12.8", "13.0"):
            use_assembler(monkeypatch, SimpleNamespace(path=path, version=version))
            binary_of(self.KERNEL)
        assert len(assembled) == 2

    @pytest.mark.parametrize("assembler", ["missing", "too old", "no program"])
    def test_is_the_text(
        self, assembler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tool = tmp_path / "ptxas"
        tool.write_text("#!/bin/sh\nexit 255\n")
        tool.chmod(0o755 if assembler == "too old" else 0o644)
        stand_in = SimpleNamespace(path=str(tool), version="11.0")
        use_assembler(monkeypatch, None if assembler == "missing" else stand_in)
        text = binary_of(self.KERNEL)
        assert text.startswith(b".version 8.0") and text.endswith(b"\0")
        assert text.count(b".visible .entry") == 1

    def test_is_the_text_where_nothing_can_be_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/cache")
        assert binary_of(self.KERNEL).startswith(b".version 8.0")


def use_assembler(monkeypatch: pytest.MonkeyPatch, tool: SimpleNamespace | None) -> None:
    """In the place of Triton's; None: Triton has none."""

    class Knobs:
        @property
        def ptxas(self) -> SimpleNamespace:
            if tool is None:
                raise RuntimeError("Cannot find ptxas")
            return tool

    monkeypatch.setattr(module, "knobs", SimpleNamespace(nvidia=Knobs()))
