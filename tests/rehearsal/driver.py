"""Triton's driver for a GPU that is not there: kernels are compiled for it, and never run."""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


class Driver:
    """What Triton asks a driver for on its way to a launch.

    Args:
        arch: ten times the compute capability.
    """

    loaded: ClassVar[list[str]] = []  # names of kernels

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self.launcher_cls = Launcher
        properties = {"max_shared_mem": SHARED_MEMORY[arch], "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=self._load,
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads of a block

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()


class Launcher:
    """Launches nothing."""

    built: ClassVar[list[Any]] = []  # what each was built from

    def __init__(self, source: Any, metadata: Any) -> None:
        self.built.append(source)

    def __call__(self, *arguments: Any) -> None:
        pass


def use(arch: int = 90) -> None:
    """Make Triton take this machine for one with a GPU of compute capability ``arch`` / 10."""
    triton.runtime.driver.set_active(Driver(arch))
