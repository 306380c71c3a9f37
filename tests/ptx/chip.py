"""A chip that is not there, as Triton's driver: kernels are compiled for it and run as PTX."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.backends.nvidia.compiler import CUDABackend

from tests.ptx.compiled import BUILD
from tests.ptx.decoder import decode
from tests.ptx.launch import Argument, Record, launch
from tests.ptx.memory import WatchedMemory

KIB = 1024
# Largest shared memory of a program: CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
Change = Callable[[str, str], str]  # of a kernel's PTX before it runs, by its name


class Chip:
    """What runs and what came of it.

    Attributes:
        memory: of the tensors that are made on the chip.
        records: the launches, in order.

    Args:
        arch: ten times the compute capability, one of ``SHARED_MEMORY``.
        seed: of the order in which warps run.
        early_copies: as in :func:`tests.ptx.launch.launch`.
        change: breaks kernels on purpose.
    """

    def __init__(
        self, arch: int, *, seed: int = 1, early_copies: bool = False, change: Change | None = None
    ) -> None:
        self.arch = arch
        self.seed = seed
        self.early_copies = early_copies
        self.change = change
        self.memory = WatchedMemory()
        self.records: list[Record] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Launches of Triton's kernels on CPU tensors run here."""
        config = triton.runtime.driver
        before, make_cubin = config._active, CUDABackend.make_cubin
        config.set_active(_Driver(self))
        # what is loaded is then the PTX; ptxas does not run
        CUDABackend.make_cubin = lambda self, src, *_: src.encode()
        try:
            with triton.knobs.cache.scope(), self.memory:
                triton.knobs.cache.dir = str(BUILD / "triton")  # no binaries: for nobody else
                yield
        finally:
            CUDABackend.make_cubin = make_cubin
            config._active = before

    def run(
        self, kernel: str, text: str, grid: tuple[int, int, int], arguments: list[Argument],
        *, warps: int, shared: int,
    ) -> None:  # fmt: skip
        """A launch of compiled PTX."""
        if self.change is not None:
            text = self.change(kernel, text)
        record = launch(
            text, grid, arguments, warps=warps, shared=shared,
            memory=self.memory, seed=self.seed, early_copies=self.early_copies,
        )  # fmt: skip
        self.records.append(record)

    def violations(self) -> list[str]:
        """Of all launches, each after its kernel's name."""
        return [f"{record.kernel}: {text}" for record in self.records for text in record.violations]


class _Utils:
    """What Triton asks a driver when a kernel is loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[device]}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, str, int, int, int]:
        """Module, function, registers, spills and most threads: the function is the PTX."""
        if shared > SHARED_MEMORY[device]:
            raise RuntimeError(f"shared: at most {SHARED_MEMORY[device]} bytes, got {shared}")
        if (found := decode(text := binary.decode()).name) != name:
            raise RuntimeError(f"the module holds {found}, expected {name}")
        return 1, text, 0, 0, 1024


class _Launcher:
    """In the place of CudaLauncher."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature = list(src.signature.values())
        for name in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, name, 0):
                raise NotImplementedError(f"{metadata.name} wants scratch memory: {name}")
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError(f"{metadata.name} wants clusters")

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: str, packed: Any,
        launch_metadata: Any, enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        given = [*flat(self.signature, arguments), ("u64", 0), ("u64", 0)]  # no scratch memory
        program, (warps, _, shared) = decode(function), packed
        taken = given[: len(program.params)]  # kernels in CUDA C++ have no place for the last two
        triton.runtime.driver.active.chip.run(
            program.name, function, (x, y, z), taken, warps=warps, shared=shared
        )


def flat(types: Sequence[Any], values: Sequence[Any]) -> Iterator[Argument]:
    """Arguments without constants, elements of tuples one by one."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


class _Driver(GPUDriver):
    """In the place of CudaDriver; the number of the device is its compute capability."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.chip.arch, 10)

    def get_current_device(self) -> int:
        return self.chip.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    @staticmethod
    def is_active() -> bool:
        return True
