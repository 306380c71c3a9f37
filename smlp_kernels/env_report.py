"""``python -m smlp_kernels.env_report``: versions, GPU, and the path a block would take here.

For bug reports, and for the question why a block runs on PyTorch.
"""

import argparse
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from smlp.testing import PRECISIONS
from smlp_kernels import ops
from smlp_kernels.functional import fallback_reason
from smlp_kernels.kernels.axis import axis_tile
from smlp_kernels.launch import DIRECT, INTERPRETED, arch_of, input_precision
from smlp_kernels.weights import Weights

PACKAGES = ("smlp-kernels", "triton", "einops", "numpy")
VARIABLES = (
    "SMLP_KERNELS_DISABLE",
    "SMLP_KERNELS_HOPPER",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
)
TYPES = {name: p.dtype for name, p in PRECISIONS.items() if p.products == "ieee"}


def environment() -> list[tuple[str, str]]:
    """Name and value of everything about this machine that a bug report needs."""
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    lines.append(("torch", torch.__version__))  # with its build, which the package's own leaves out
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed as a package"))
    lines.append(("CUDA of torch", torch.version.cuda or "none: a build for CPUs"))
    lines.append(("driver", driver_version()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            (
                f"cuda:{index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} SMs, {properties.total_memory >> 30} GiB",
            )
        )
    if not torch.cuda.device_count():
        lines.append(("GPU", "none visible"))
    lines.append(("float32 products", input_precision(torch.float32)))
    lines.append(("kernels are launched", "directly" if DIRECT else "by Triton"))
    lines += [(name, os.environ.get(name, "not set")) for name in VARIABLES]
    return lines


def driver_version() -> str:
    """The NVIDIA driver's version, as nvidia-smi tells it."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.split("\n")[0].strip() or f"nvidia-smi failed: {result.stderr.strip()}"


def path_of(x: torch.Tensor) -> list[str]:
    """What runs a block on an input of this shape, type and device, and why; a line each."""
    _, channels, height, width = x.shape
    reason = fallback_reason(x)
    if reason is not None:
        return [f"runs on PyTorch: {reason}"]
    place = "in Triton's interpreter (slow, for tests)" if INTERPRETED else f"on {x.device}"
    lines = [f"runs on the fused kernels {place}"]
    for name, forward in (("forward", True), ("backward", False)):
        for axis, size in (("H", height), ("W", width)):
            tile = axis_tile(size, channels, x.dtype, arch_of(x), forward)
            lines.append(f"{name} along {axis}: {tile or 'products of PyTorch'}")
    lines.append(f"instead of the forward's, if channels_last: {hopper_path(x)}")
    return lines


def hopper_path(x: torch.Tensor) -> str:
    """The kernel in CUDA C++ that takes an input of this shape, type and device, or why none."""
    if ops.run_hopper is None:
        return "no Hopper kernel: they are off unless SMLP_KERNELS_HOPPER=1 is set"
    from smlp_kernels import hopper

    if arch_of(x) != hopper.ARCH:
        return "no Hopper kernel: the compute capability is not 9.0"
    _, channels, height, width = x.shape
    like = functools.partial(torch.empty, dtype=x.dtype, device="meta")
    projs = like(height, height), None, like(width, width), None
    weights = Weights(*projs, like(channels, 3 * channels), None)
    x_rows = like(x.shape, memory_format=torch.channels_last)
    try:
        kernel = hopper.prepare(x_rows, weights, x.device.index)
    except hopper.UnavailableError as error:
        return f"no Hopper kernel: {error}"
    return "no Hopper kernel for this size and type" if kernel is None else f"{kernel.name}, loaded"


def block_size(text: str) -> tuple[int, int, int]:
    """Height, width and channels of "56x56x80"."""
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTHxCHANNELS, got {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report versions, GPU and a block's path.")
    parser.add_argument("--block", type=block_size, default=(56, 56, 80), metavar="HxWxC")
    parser.add_argument("--dtype", choices=TYPES, default="bf16", help="type of the block's input")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    height, width, channels = options.block
    try:
        x = torch.empty(1, channels, height, width, dtype=TYPES[options.dtype]).to(options.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        parser.error(f"--device: {options.device!r} cannot be used: {error}")
    for name, value in environment():
        print(f"{name:24} {value}")
    print(f"\na block {height}x{width}x{channels}, {options.dtype}, on {options.device}:")
    for line in path_of(x):
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
