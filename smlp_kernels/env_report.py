"""``python -m smlp_kernels.env_report``: versions, GPU, and the path a block would take here.

For bug reports, and to find out why a block runs on PyTorch.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

import torch

from smlp import SMLPBlock, machine
from smlp.testing import PRECISIONS
from smlp_kernels import hopper, ops
from smlp_kernels.functional import fallback_reason
from smlp_kernels.kernels.narrow import is_narrow
from smlp_kernels.kernels.tiles import axis_row
from smlp_kernels.launch import DIRECT, INTERPRETED, arch_of, input_precision
from smlp_kernels.weights import Weights

VARIABLES = (
    "SMLP_KERNELS_DISABLE",
    "SMLP_KERNELS_HOPPER",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
)
TYPES = {name: p.dtype for name, p in PRECISIONS.items() if p.products == "ieee"}


def environment(gpu: int = 0) -> machine.Facts:
    """Everything about this machine that a bug report needs, by name."""
    return {
        "gpu": None,  # unless there is one
        **machine.describe(gpu),
        "float32 products": input_precision(torch.float32),
        "kernels are launched": "directly" if DIRECT else "by Triton",
        **{name: os.environ.get(name, "not set") for name in VARIABLES},
    }


def path_of(x: torch.Tensor) -> list[str]:
    """Say line by line what runs a block for an input of this shape, type and device, and why."""
    height, width = x.shape[2:]
    reason = fallback_reason(x)
    if reason is not None:
        return [f"runs on PyTorch: {reason}"]
    place = "in Triton's interpreter (slow, for tests)" if INTERPRETED else f"on {x.device}"
    lines = [f"runs on the fused kernels {place}"]
    for name, forward in (("forward", True), ("backward", False)):
        for axis, size in (("H", height), ("W", width)):
            row = axis_row(size, x.dtype, arch_of(x), forward)
            lines.append(f"{name} along {axis}: {row or 'products of PyTorch'}")
    if is_narrow(x.shape, x.dtype, arch_of(x)):
        lines.append("instead of these, if channels_last: narrow_kernel along H and W")
    return [*lines, f"Hopper kernel for a channels_last forward: {hopper_path(x)}"]


def hopper_path(x: torch.Tensor) -> str:
    """The kernel in CUDA C++ that takes an input of this shape, type and device, or why none."""
    if ops.run_hopper is None:
        return "none: SMLP_KERNELS_HOPPER=0 is set"
    if arch_of(x) != hopper.ARCH:
        return "none: the compute capability is not 9.0"
    _, channels, height, width = x.shape
    block = SMLPBlock(height, width, channels, dtype=x.dtype, device="meta")
    x_rows = torch.empty_like(x, memory_format=torch.channels_last, device="meta")
    return hopper.path_of(x_rows, Weights(*block.weights()), x)


def block_size(text: str) -> tuple[int, int, int]:
    """Height, width and channels of "56x56x80"."""
    if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTHxCHANNELS, got {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def main(arguments: Sequence[str] | None = None) -> int:
    text = "Report versions, the GPU, and the path that a block takes on this machine."
    parser = argparse.ArgumentParser("python -m smlp_kernels.env_report", description=text)
    text = "height, width and channels (default 56x56x80)"
    parser.add_argument("--block", type=block_size, default="56x56x80", metavar="HxWxC", help=text)
    text = "type of the input (default bf16)"
    parser.add_argument("--dtype", choices=TYPES, default="bf16", help=text)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, help=f"such as cuda:1 (default here: {here})")
    options = parser.parse_args(arguments)
    height, width, channels = options.block
    try:
        x = torch.empty(1, channels, height, width, dtype=TYPES[options.dtype]).to(options.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        parser.error(f"--device: {options.device!r} cannot be used: {error}")
    for name, value in environment(x.device.index or 0).items():
        print(f"{name:24} {'none' if value is None else value}")
    print(f"\na block {height}x{width}x{channels}, {options.dtype}, on {options.device}:")
    for line in path_of(x):
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
