"""``mix`` as one kernel in CUDA C++, for compute capability 9.0: see DESIGN.md.

It ships as PTX text, and is loaded and launched by Triton's driver, as Triton's own kernels are.
"""

import functools
import hashlib
import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.cache import get_cache_manager

from smlp_kernels.hopper.plan import WARPS, call_of
from smlp_kernels.launch import Call, on_device_of
from smlp_kernels.weights import Weights

ARCH = 90  # no other: wgmma exists only on 9.0
TEXT = Path(__file__).with_name("kernels.ptx.xz")  # of all kernels
OPTIONS = ("-arch=sm_90a", "-O3")  # of ptxas
BLOCK = (WARPS, 1, 227 << 10)  # as Triton packs it: blocks of a cluster; bytes, MAX_SHARED
SIGNATURE = dict(enumerate(("*i8",) * 9 + ("i32",) * 17))  # KERNEL in kernels.cu

logger = logging.getLogger(__name__)
warn_once = functools.cache(logger.warning)


def mix(x: Tensor, weights: Weights) -> Tensor | None:
    """The block, or None where the kernels do not apply or do not run.

    Args:
        x: [B, C, H, W], on the current device, a GPU of ``ARCH``.
        weights: any floating types, any strides.
    """
    call = call_of(x, weights, multiprocessors(x.device.index))
    if call is None:
        return None
    if reason := launch(call):
        warn_once("the Hopper kernel is not used: %s", reason)
        return None
    return call.tensors[1]


def path_of(x: Tensor, weights: Weights, device_of: Tensor) -> str:
    """Load what :func:`mix` would launch, and say which kernel that is, or why there is none.

    ``x`` and the weights may be on the meta device; it would run where ``device_of`` is.
    """
    call = call_of(x, weights, multiprocessors(device_of.device.index))
    if call is None:
        return "none for this size and type"
    name = call.plan.kernel
    with on_device_of(device_of):
        loaded = load(name, triton.runtime.driver.active.get_current_device())
    return f"none: {loaded}" if isinstance(loaded, str) else f"{name}, loaded"


def launch(call: Call) -> str | None:
    """Run the kernel that the plan names on the current device, or say why it does not run."""
    plan, tensors = call
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    try:
        loaded = load(plan.kernel, device)
        if isinstance(loaded, str):
            return loaded
        run, function = loaded
        grid, stream = (plan.programs, 1, 1), driver.get_current_stream(device)
        run(*grid, stream, function, BLOCK, None, None, None, *tensors, *plan.integers)
    except Exception as error:
        return repr(error)
    return None


@functools.cache
def load(name: str, device: int) -> tuple[Any, int] | str:
    """Triton's launcher and a kernel for it, or why the kernel is refused, for good.

    Raises:
        RuntimeError: a CUDA graph is being captured, during which nothing can be loaded.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} was not loaded before a CUDA graph was captured: call the block once, or "
            "smlp_kernels.warmup, before the capture"
        )
    scratch = {f"{of}_scratch_{n}": 0 for of in ("global", "profile") for n in ("size", "align")}
    try:
        metadata = SimpleNamespace(**vars(CUDAOptions()), **scratch)
        driver = triton.runtime.driver.active
        run = driver.launcher_cls(SimpleNamespace(signature=SIGNATURE), metadata)
        binary = binary_of(name)
        _, function, _, spilled, _ = driver.utils.load_binary(name, binary, BLOCK[2], device)
    except Exception as error:
        return repr(error)
    if spilled:  # with no known assembler; it would be slower, and is untested
        return f"{name} spills {4 * spilled} bytes of registers"
    return run, function


def binary_of(kernel: str) -> bytes:
    """Machine code by Triton's ptxas, kept in Triton's cache."""
    import lzma  # some Pythons are built without it

    ptxas, packed = knobs.nvidia.ptxas, TEXT.read_bytes()
    version = f"{ptxas.path} {ptxas.version}".encode()
    cache = get_cache_manager(hashlib.sha256(packed + version).hexdigest())
    if path := cache.get_file(f"{kernel}.cubin"):
        return Path(path).read_bytes()
    command = [ptxas.path, *OPTIONS, "-e", kernel, "/dev/stdin", "-o", "/dev/stdout"]
    text = lzma.decompress(packed)
    binary = subprocess.check_output(command, input=text, stderr=subprocess.PIPE)
    cache.put(binary, f"{kernel}.cubin")
    return binary


@functools.cache
def multiprocessors(device: int) -> int:
    """SMs of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count
