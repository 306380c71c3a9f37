"""The launch of every kernel, under the device guard, and what all calls have in common."""

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

logger = logging.getLogger(__name__)

INT32_MAX = 2**31 - 1
PLANS = 1024  # kept per process and operator: one for each combination of shapes, strides and types
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # fixed when the kernels are imported

Strides = tuple[int, ...]


class Plan(NamedTuple):
    """All of a launch but the tensors: what depends on their shapes, strides and types alone."""

    kernel: Any
    programs: int
    integers: tuple[int, ...]  # arguments after the tensors, in the kernel's order
    constants: dict[str, Any]  # tl.constexpr arguments
    num_warps: int
    num_stages: int
    registers: int | None = None  # registers of a thread, at most


class Call(NamedTuple):
    """A kernel and what it is launched with; the same for a launch and for compiling ahead."""

    plan: Plan
    tensors: tuple[Tensor | None, ...]

    def launch(self, device_of: Tensor) -> None:
        """Run on the device of a tensor: Triton itself would take the current device."""
        kernel, programs, integers, constants, num_warps, num_stages, registers = self.plan
        with on_device_of(device_of):
            kernel[(programs,)](
                *self.tensors,
                *integers,
                **constants,
                num_warps=num_warps,
                num_stages=num_stages,
                maxnreg=registers,
            )

    def run(self, device_of: Tensor) -> None:
        """:meth:`launch`; where the chip has not the memory for it, with a shorter pipeline.

        Shipped tiles fit the chips that they were compiled for; this is for others.
        """
        try:
            self.launch(device_of)
        except triton.OutOfResources as error:
            stages = self.plan.num_stages - 1
            if stages == 0:
                raise
            warn_once(f"{self.plan.kernel.__name__} runs with num_stages={stages}: {error}")
            self._replace(plan=self.plan._replace(num_stages=stages)).run(device_of)

    def compile(self, device_of: Tensor) -> Any:
        """Compile what :meth:`launch` runs; the call's tensors may be on the meta device.

        Returns Triton's compiled kernel, or what stands for it while it is compiled by another
        thread; None in the interpreter.
        """
        kernel, programs, integers, constants, num_warps, num_stages, registers = self.plan
        with on_device_of(device_of):
            return kernel.warmup(
                *self.tensors,
                *integers,
                **constants,
                grid=(programs,),
                num_warps=num_warps,
                num_stages=num_stages,
                maxnreg=registers,
            )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process did before."""
    logger.warning(message)


def dense(bias: Tensor | None) -> Tensor | None:
    """The kernels take biases without strides; gradients in their place may be expanded."""
    return None if bias is None else bias.contiguous()


def in_type_of(x: Tensor, *weights: Tensor) -> Sequence[Tensor]:
    """Weights in the type of ``x``; what autocast converts takes one launch for all of them."""
    if all(weight.dtype == x.dtype for weight in weights):
        return weights
    converted = [torch.empty_like(weight, dtype=x.dtype) for weight in weights]
    torch._foreach_copy_(converted, weights)
    return converted


def fuse_strides(fuse: Tensor) -> tuple[int, int, int]:
    """Strides of a fuse weight along branch, output and input channel."""
    if fuse.dim() == 3:
        return fuse.stride(1), fuse.stride(0), fuse.stride(2)
    return fuse.shape[0] * fuse.stride(1), fuse.stride(0), fuse.stride(1)


def input_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch's own float32-matmul setting says."""
    # not allow_tf32: reading it raises once the setting was made through the newer names
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def any_index_64(shape: torch.Size, images: int, *strides: Strides) -> bool:
    """Whether :func:`needs_index_64` holds for one of several tensors of a shape."""
    return any(needs_index_64(shape, s, images) for s in strides)


def needs_index_64(shape: torch.Size, strides: Strides, images: int) -> bool:
    """Whether offsets inside a tile of ``images`` images [B, C, H, W] exceed 31 bits."""
    sizes = (min(images, shape[0]), *shape[1:])
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return last > INT32_MAX


def arch_of(x: Tensor) -> int:
    """Ten times the compute capability; 0 in the interpreter, which has the rule for every chip."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device the current one, at no cost where it is."""
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
