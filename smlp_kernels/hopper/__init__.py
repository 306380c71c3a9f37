"""``mix`` as one kernel in CUDA C++, for compute capability 9.0: see DESIGN.md."""

import contextlib
import functools
import logging

import torch
import triton
from torch import Tensor

from smlp_kernels.hopper.driver import Driver, Kernel, UnavailableError
from smlp_kernels.hopper.plan import call_of
from smlp_kernels.launch import arch_of
from smlp_kernels.weights import Weights

ARCH = 90  # no other: wgmma exists only there

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())

cuda_driver = functools.cache(Driver)


def mix(x: Tensor, weights: Weights) -> Tensor | None:
    """The block, or None where the kernels do not apply or do not run.

    Args:
        x: [B, C, H, W], on a GPU of ``ARCH``.
        weights: any floating types, any strides.
    """
    device = x.device.index
    call = call_of(x, weights, multiprocessors(device))
    if call is None:
        return None
    try:
        cuda_driver().launch(call, device, triton.runtime.driver.active.get_current_stream(device))
    except UnavailableError as error:
        warn_once(str(error))
        return None
    return call.tensors[1]


def prepare(x: Tensor, weights: Weights, device: int) -> Kernel | None:
    """Load what :func:`mix` would launch; None where no kernel applies.

    Args:
        x: on any device; its values are not looked at, nor are those of the weights.
        weights: any floating types, any strides.
        device: where it would run, a GPU of ``ARCH``.

    Raises:
        UnavailableError: if the kernel does not run there.
    """
    call = call_of(x, weights, multiprocessors(device))
    return None if call is None else cuda_driver().load(call.plan, device)


def warm_up(x: Tensor, weights: Weights, device: int) -> None:
    """As :func:`prepare`; where that fails, the call itself says so."""
    with contextlib.suppress(UnavailableError):
        prepare(x, weights, device)


def path_of(x: Tensor) -> str:
    """The kernel that takes channels_last inputs of a shape, type and device, or why none does."""
    if arch_of(x) != ARCH:
        return "no Hopper kernel: the compute capability is not 9.0"
    _, channels, height, width = x.shape
    like = functools.partial(torch.empty, dtype=x.dtype, device="meta")
    projs = like(height, height), None, like(width, width), None
    weights = Weights(*projs, like(channels, 3 * channels), None)
    x_rows = like(x.shape, memory_format=torch.channels_last)
    try:
        kernel = prepare(x_rows, weights, x.device.index)
    except UnavailableError as error:
        return f"no Hopper kernel: {error}"
    return "no Hopper kernel for this size and type" if kernel is None else f"{kernel.name}, loaded"


@functools.cache
def multiprocessors(device: int) -> int:
    """SMs of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def warn_once(reason: str) -> None:
    """Say why Triton's kernels run instead."""
    logger.warning("the Hopper kernel is not used: %s", reason)
