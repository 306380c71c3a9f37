"""``mix`` as one kernel in CUDA C++, for compute capability 9.0: see DESIGN.md.

It ships as PTX text, and is loaded and launched by Triton's driver, as Triton's own kernels are.
"""

import functools
import hashlib
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.compiler import CUDAOptions
from triton.runtime.cache import get_cache_manager

from smlp_kernels.hopper.plan import WARPS, call_of
from smlp_kernels.launch import Call, on_device_of
from smlp_kernels.weights import Weights

ARCH = 90  # no other: wgmma exists only there
TEXT = Path(__file__).with_name("kernels.ptx.xz")
OPTIONS = ("-arch=sm_90a", "-O3")  # of ptxas
BLOCK = (WARPS, 1, 227 << 10)  # as Triton packs it: blocks of a cluster; bytes, MAX_SHARED

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())

Start = Callable[..., None]  # is given the programs and the kernel's arguments
loaded: dict[tuple[str, int], Start | str] = {}  # by kernel and device; a reason why there is none


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
        warn_once(reason)
        return None
    return call.tensors[1]


def path_of(x: Tensor, weights: Weights, device_of: Tensor) -> str:
    """Load what :func:`mix` would launch, and say which kernel that is or why there is none.

    ``x`` and the weights may be on the meta device; it would run where ``device_of`` is.
    """
    call = call_of(x, weights, multiprocessors(device_of.device.index))
    if call is None:
        return "no Hopper kernel for this size and type"
    with on_device_of(device_of):
        kernel = load(call.plan.kernel)
    return (
        f"no Hopper kernel: {kernel}" if isinstance(kernel, str) else f"{call.plan.kernel}, loaded"
    )


def launch(call: Call) -> str | None:
    """Run a kernel, which the plan names, on the current device, or say why it does not run."""
    plan = call.plan
    start = load(plan.kernel)
    if isinstance(start, str):
        return start
    try:
        start(plan.programs, *call.tensors, *plan.integers)
    except Exception as error:
        return repr(error)
    return None


def load(name: str) -> Start | str:
    """A kernel on the current device; one that was refused stays so, for the same reason."""
    device = triton.runtime.driver.active.get_current_device()
    if kernel := loaded.get((name, device)):
        return kernel
    if torch.cuda.is_current_stream_capturing():
        return (
            f"{name} was not loaded before a CUDA graph was captured: call the block once, or "
            "smlp_kernels.warmup, before the capture"
        )
    try:
        loaded[name, device] = load_text(name, device, ptx_of(name))
    except Exception as error:
        loaded[name, device] = repr(error)
    return loaded[name, device]


def load_text(name: str, device: int, text: str) -> Start:
    """What :func:`load` keeps, of a text with one kernel; any error if that fails."""
    driver = triton.runtime.driver.active
    types = ["*i8" if bits == "64" else "i32" for bits in re.findall(r"\.param \.u(\d+)", text)]
    scratch = dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0)
    unused = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
    metadata = SimpleNamespace(**vars(CUDAOptions()), **scratch, **unused)
    run = driver.launcher_cls(SimpleNamespace(signature=dict(enumerate(types))), metadata)
    binary = binary_of(name, text.encode())
    _, function, _, spilled, _ = driver.utils.load_binary(name, binary, BLOCK[2], device)
    if spilled:  # by no assembler known: it is slower, and nobody has looked at it
        raise RuntimeError(f"{name} spills {4 * spilled} bytes of registers")

    def start(programs: int, *arguments: Tensor | int | None) -> None:
        stream = driver.get_current_stream(device)
        run(programs, 1, 1, stream, function, BLOCK, None, None, None, *arguments)

    return start


def ptx_of(kernel: str) -> str:
    """PTX text of one kernel."""
    import lzma  # some Pythons are built without it

    text = lzma.decompress(TEXT.read_bytes()).decode()
    head, *kernels = re.split(r"(?m)^(?=\.visible \.entry)", text)
    return head + next(text for text in kernels if text.startswith(f".visible .entry {kernel}("))


def binary_of(kernel: str, text: bytes) -> bytes:
    """Machine code by Triton's ptxas, kept in Triton's cache.

    Without one that works, the text, which the driver assembles itself.
    """
    try:
        ptxas = knobs.nvidia.ptxas
        version = f"{ptxas.path} {ptxas.version}".encode()
        cache = get_cache_manager(hashlib.sha256(text + version).hexdigest())
        if path := cache.get_file(f"{kernel}.cubin"):
            return Path(path).read_bytes()
        command = [ptxas.path, *OPTIONS, "/dev/stdin", "-o", "/dev/stdout"]
        binary = subprocess.run(command, input=text, check=True, capture_output=True).stdout
        cache.put(binary, f"{kernel}.cubin")
    except (OSError, RuntimeError, subprocess.CalledProcessError):
        return text + b"\0"
    return binary


@functools.cache
def multiprocessors(device: int) -> int:
    """SMs of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def warn_once(reason: str) -> None:
    """Say why Triton's kernels run instead."""
    logger.warning("the Hopper kernel is not used: %s", reason)
