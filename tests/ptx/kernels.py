"""All that the executor knows about ``smlp_kernels``: how a CPU tensor passes for a CUDA tensor."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.ptx.chip import Chip
from tools.hopper_ptx import shipped_ptx


class _OnGpu:
    """A tensor's shape, type and device, as ``fallback_reason`` looks at them."""

    is_cuda = True

    def __init__(self, x: Tensor) -> None:
        self.shape, self.dtype, self.device, self.dim = x.shape, x.dtype, x.device, x.dim


@contextlib.contextmanager
def blocks_on(chip: Chip, multiprocessors: int = 0) -> Iterator[None]:
    """Fused blocks run their kernels on ``chip``, on CPU tensors made anywhere.

    Args:
        chip: of any compute capability.
        multiprocessors: of a chip on which the kernels in CUDA C++ run where they apply; 0: one on
            which only Triton's do.
    """
    import smlp_kernels  # not before TRITON_INTERPRET is unset
    from smlp_kernels import hopper
    from smlp_kernels.launch import INT32_MAX, INTERPRETED

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled, so there is no PTX")
    reason = smlp_kernels.fallback_reason
    changes: dict[str, Callable[..., Any] | None] = {
        "arch_of": lambda x: chip.arch,
        "on_device_of": lambda x: contextlib.nullcontext(),
        "fallback_reason": lambda x: reason(_OnGpu(x)),  # type: ignore[arg-type]
        "run_hopper": hopper.mix if multiprocessors else None,
    }
    if multiprocessors:
        changes |= {
            "multiprocessors": lambda device: multiprocessors,
            "CUBLAS_PIXELS": INT32_MAX,  # whatever the plan prefers
            # what is loaded is then the PTX; ptxas does not run
            "binary_of": lambda kernel: shipped_ptx(kernel).encode(),
        }
    with contextlib.ExitStack() as stack:
        for name, replacement in changes.items():
            stack.enter_context(replaced(name, replacement))
        # torch for CPUs cannot be asked
        no_graph = mock.patch("torch.cuda.is_current_stream_capturing", lambda: False)
        stack.enter_context(no_graph)
        stack.enter_context(chip.active())
        yield


@contextlib.contextmanager
def replaced(name: str, replacement: Any) -> Iterator[None]:
    """A function of the package, in every module that has it under this name."""
    owners = [
        module
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] == "smlp_kernels" and name in vars(module)
    ]
    if not owners:
        raise AttributeError(f"smlp_kernels has no {name} any more; tests/ptx/kernels.py wants it")
    before = {module: vars(module)[name] for module in owners}
    try:
        for module in owners:
            setattr(module, name, replacement)
        yield
    finally:
        for module, value in before.items():
            setattr(module, name, value)


def has_tile(arch: int, dtype: torch.dtype, positions: int) -> bool:
    """Whether kernels run along an axis of this size in any pass, or else PyTorch's products."""
    from smlp_kernels.kernels.tiles import axis_row

    return any(axis_row(positions, dtype, arch, forward) for forward in (True, False))
