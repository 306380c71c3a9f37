"""Plans and launches of kernels, the device guard, and what else all calls have in common."""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INT32_MAX = 2**31 - 1
PLANS = 1024  # kept per process and operator, one per combination of shapes, strides and types
HOPPER = os.environ.get("SMLP_KERNELS_HOPPER") != "0"  # kernels that only 9.0 has are on
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # fixed when the kernels are imported

# Minor versions of Triton whose compiled kernels are known to take what Call.launch passes.
DIRECT = not INTERPRETED and triton.__version__.rsplit(".", 1)[0] in ("3.6", "3.7", "3.9")

Strides = tuple[int, ...]


@dataclass(eq=False)
class Plan:
    """All of a launch but the tensors: it depends only on their shapes, strides and types."""

    kernel: Any
    programs: int
    integers: tuple[int, ...]  # arguments after the tensors, in the kernel's order
    constants: dict[str, Any]  # tl.constexpr arguments, the last ones, in the kernel's order
    num_warps: int
    registers: int | None = None  # of a thread, at most
    # by device, types and alignment of the tensors, for which Triton compiles as well
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # no kernel has a loop of asynchronous copies
        self.options = {"num_warps": self.num_warps, "num_stages": 1, "maxnreg": self.registers}
        self.arguments = (*self.integers, *self.constants.values())


class Call(NamedTuple):
    """A kernel and what it is launched with; the same for a launch and for compiling ahead.

    Kernels are compiled for the types of tensors and the constants, not for integers.
    """

    plan: Plan
    tensors: tuple[Tensor | None, ...]

    def launch(self) -> None:
        """Run on the current device.

        The first launch is Triton's own. It returns the compiled kernel, which later ones hand to
        the driver as Triton would, without its 10 to 20 us of Python.
        """
        plan, tensors = self
        if not DIRECT or has_launch_hooks():
            self.by_triton()
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key: list[Any] = [device]  # a comprehension would be a call of a function
        addresses = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            else:
                key.append(tensor.dtype)
                addresses |= tensor.data_ptr()
        if addresses % 16:
            key += [tensor.data_ptr() % 16 for tensor in tensors if tensor is not None]
        found = tuple(key)
        kernel = plan.compiled.get(found)
        if kernel is None:
            plan.compiled[found] = self.by_triton()
            return
        kernel.run(
            *(plan.programs, 1, 1, driver.get_current_stream(device)),
            *(kernel.function, kernel.packed_metadata),
            *(None, None, None),  # what launch hooks are told, and the hooks
            *tensors,
            *plan.arguments,
        )

    def by_triton(self, *, launch: bool = True) -> Any:
        """Compile if necessary, launch, and return the compiled kernel; None in the interpreter.

        Without a launch the tensors may be on the meta device, and what is returned stands for the
        kernel while another thread compiles it.
        """
        plan = self.plan
        arguments, named = (*self.tensors, *plan.integers), plan.constants | plan.options
        if launch:
            return plan.kernel[(plan.programs,)](*arguments, **named)
        return plan.kernel.warmup(*arguments, grid=(plan.programs,), **named)


Launch = Callable[[Call], None]  # runs a call, or notes it


def has_launch_hooks() -> bool:
    """Whether something, such as Triton's profiler, hooks into launches."""
    runtime = triton.knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # the lists of hooks have changed
        return True


def cdiv(size: int, block: int) -> int:
    """Blocks of a size; triton.cdiv takes 2 us."""
    return -(-size // block)


def input_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own float32-matmul setting says."""
    # not allow_tf32: reading it raises if the setting was made through the newer names
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def arch_of(x: Tensor) -> int:
    """Ten times the compute capability; 0 in the interpreter, which takes rows for all chips."""
    if not x.is_cuda:
        return 0
    # Dynamo warns when it traces through a cache
    ask = capability.__wrapped__ if torch.compiler.is_compiling() else capability
    return ask(x.device.index)


@functools.cache
def capability(device: int) -> int:
    """Ten times the compute capability of a GPU; asking the driver takes a microsecond."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, at no cost if it already is."""
    if not x.is_cuda:
        if INTERPRETED:
            return contextlib.nullcontext()
        raise ValueError(
            f"x: expected a CUDA tensor, got one on {x.device}; on other devices the kernels run "
            "only in Triton's interpreter (set TRITON_INTERPRET=1 before they are imported)"
        )
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
