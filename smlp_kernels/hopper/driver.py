"""From PTX text to a launch: Triton's assembler, then the CUDA driver's C interface by ctypes."""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime.cache import get_cache_manager

from smlp_kernels.hopper.plan import THREADS, Call, Plan

TEXT = Path(__file__).with_name("kernels.ptx.xz")
OPTIONS = ("-arch=sm_90a", "-O3")  # of ptxas
LOCAL_SIZE_BYTES, MAX_DYNAMIC_SHARED_SIZE_BYTES = 3, 8  # CUfunction_attribute


class UnavailableError(RuntimeError):
    """A kernel cannot be loaded or launched here; the message says why."""


class Kernel(NamedTuple):
    """A kernel on a device."""

    name: str
    function: ctypes.c_void_p
    context: ctypes.c_void_p  # the device's primary one, which torch uses as well


def ptx_of(kernel: str, file: Path = TEXT) -> str:
    """PTX text of one kernel of a file; an UnavailableError if it cannot be read."""
    try:
        import lzma  # some Pythons are built without it

        text = lzma.decompress(file.read_bytes()).decode()
    except Exception as error:
        raise UnavailableError(f"{file.name} cannot be read: {error!r}") from error
    head, *kernels = re.split(r"(?m)^(?=\.visible \.entry)", text)
    return head + next(text for text in kernels if text.startswith(f".visible .entry {kernel}("))


def binary_of(kernel: str, file: Path = TEXT) -> bytes:
    """Machine code by Triton's ptxas, kept in Triton's cache.

    Without one that works, the text, which the driver assembles itself.
    """
    text = ptx_of(kernel, file).encode()
    try:
        ptxas = knobs.nvidia.ptxas
        version = f"{ptxas.path} {ptxas.version}".encode()
        cache = get_cache_manager(hashlib.sha256(text + version).hexdigest())
        if path := cache.get_file(f"{kernel}.cubin"):
            return Path(path).read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "source.ptx"), Path(folder, "binary.cubin")
            source.write_bytes(text)
            command = [ptxas.path, *OPTIONS, str(source), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True)
            binary = target.read_bytes()
        cache.put(binary, f"{kernel}.cubin")
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return text + b"\0"
    return binary


class Driver:
    """Kernels of this process on its devices.

    Args:
        name: of the driver's library.

    Raises:
        UnavailableError: in all methods, if the driver refuses.
    """

    def __init__(self, name: str = "libcuda.so.1") -> None:
        try:
            self._cuda = ctypes.CDLL(name)
        except OSError as error:
            raise UnavailableError(str(error)) from error
        integers, pointers = [ctypes.c_uint] * 7, [ctypes.c_void_p] * 3
        self._cuda.cuLaunchKernel.argtypes = [ctypes.c_void_p, *integers, *pointers]
        self._kernels: dict[tuple[int, str], Kernel | UnavailableError] = {}

    def binary(self, kernel: str) -> bytes:
        """What is loaded for a kernel."""
        return binary_of(kernel)

    def launch(self, call: Call, device: int, stream: int) -> None:
        """Run a kernel, which is loaded first if need be."""
        plan = call.plan
        kernel = self.load(plan, device)
        parameters = ctypes.c_char_p(call.parameters())  # copied by the driver before it returns
        with self._current(kernel.context):
            self._call(
                *("cuLaunchKernel", kernel.function, *plan.grid, 1, THREADS, 1, 1),
                *(plan.shared, stream, ctypes.byref(parameters), None),
            )

    def load(self, plan: Plan, device: int) -> Kernel:
        """The kernel of a plan; one that was refused before is refused again, for that reason."""
        key = device, plan.kernel
        if key not in self._kernels:
            if torch.cuda.is_current_stream_capturing():
                raise UnavailableError(
                    f"{plan.kernel} was not loaded before a CUDA graph was captured: call the "
                    "block once, or smlp_kernels.warmup, before the capture"
                )
            try:
                self._kernels[key] = self._load(plan, device)
            except UnavailableError as error:
                self._kernels[key] = error
        kernel = self._kernels[key]
        if isinstance(kernel, UnavailableError):
            raise kernel
        return kernel

    def _load(self, plan: Plan, device: int) -> Kernel:
        number, local = ctypes.c_int(), ctypes.c_int()
        context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        with self._current(context):
            self._call("cuModuleLoadData", ctypes.byref(module), self.binary(plan.kernel))
            name = plan.kernel.encode()
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name)
            self._call("cuFuncGetAttribute", ctypes.byref(local), LOCAL_SIZE_BYTES, function)
            if local.value:  # by no assembler known: it is slower, and nobody has looked at it
                raise UnavailableError(f"{plan.kernel} spills {local.value} bytes of registers")
            size = MAX_DYNAMIC_SHARED_SIZE_BYTES, plan.shared
            self._call("cuFuncSetAttribute", function, *size)
        return Kernel(plan.kernel, function, context)

    @contextmanager
    def _current(self, context: ctypes.c_void_p) -> Iterator[None]:
        """On any thread: torch makes no context current before it needs one itself."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise UnavailableError(f"{name} returned {code}")
