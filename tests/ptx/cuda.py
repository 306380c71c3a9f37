"""The CUDA driver as ``smlp_kernels.hopper`` calls it, for a chip that is not there."""

import ctypes
from typing import Any

from smlp_kernels.hopper.driver import MAX_DYNAMIC_SHARED_SIZE_BYTES, Driver
from smlp_kernels.hopper.plan import Call
from tests.ptx.chip import SHARED_MEMORY, Chip
from tests.ptx.decoder import decode


class ChipDriver(Driver):
    """libcuda for one chip: what is loaded is PTX, and what is handed to cuLaunchKernel runs.

    The executor needs the tensors of a call to know what memory there is. All else, addresses
    included, is as the package gives it to libcuda.
    """

    WITHOUT_EFFECT = (
        "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2",
        "cuFuncGetAttribute",
    )  # fmt: skip

    def __init__(self, chip: Chip) -> None:
        self._kernels = {}
        self._chip = chip
        self._texts: dict[int, str] = {}  # by the handle of a module, which a function has as well
        self._shared: dict[int, int] = {}  # bytes that a function may be launched with

    def launch(self, call: Call, device: int, stream: int) -> None:
        self._tensors = [tensor for tensor in call.tensors if tensor is not None]
        super().launch(call, device, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        if name not in self.WITHOUT_EFFECT:
            getattr(self, name)(*arguments)

    def cuModuleLoadData(self, module: Any, binary: bytes) -> None:
        module._obj.value = handle = len(self._texts) + 1
        self._texts[handle] = binary.decode()

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> None:
        if (found := decode(self._texts[module.value]).name) != name.decode():
            raise ValueError(f"the module holds {found}, expected {name.decode()}")
        function._obj.value = module.value

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> None:
        most = SHARED_MEMORY[self._chip.arch]
        if attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES or value > most:
            raise ValueError(
                f"attribute {attribute}: expected {MAX_DYNAMIC_SHARED_SIZE_BYTES}, shared memory, "
                f"and at most {most} bytes, got {value}"
            )
        self._shared[function.value] = value

    def cuLaunchKernel(self, function: Any, *arguments: Any) -> None:
        *grid, threads, block_y, block_z, shared, _, parameters, extra = arguments
        if (block_y, block_z, extra) != (1, 1, None) or shared > self._shared[function.value]:
            raise ValueError(
                f"cuLaunchKernel: threads {threads}x{block_y}x{block_z}, {shared} bytes of shared "
                f"memory of {self._shared[function.value]} allowed, extra {extra}"
            )
        program = decode(self._texts[function.value])
        ((_, size),) = program.params
        (block,) = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p * 1)).contents
        struct = ctypes.string_at(block, size), self._tensors
        self._chip.run(
            program.name, self._texts[function.value], tuple(grid), [("struct", struct)],
            warps=threads // 32, shared=shared,
        )  # fmt: skip
