"""The products of the fused block alone, as PyTorch (cuBLAS) computes them.

Three large products are left to it: y = [x_h | x_w | x] F' in the forward, G = dy F and
dF = dy' [x_h | x_w | x | 1] in the backward, each of a chunk of images. If one of them is far from
what the chip reaches on a large product, it is the next thing to replace.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.recorder import Context
from benchmarks.shapes import STAGES, Shape
from smlp_kernels.kernels.axis import matrix_columns
from smlp_kernels.kernels.products import add_product
from smlp_kernels.kernels.rows import chunk_images


def calls_of(shape: Shape, device: str) -> dict[str, Callable[[], Any]]:
    """The products of one chunk of a bfloat16 block, on random data."""
    columns, channels = matrix_columns(shape.channels), shape.channels
    pixels = shape.height * shape.width
    pixels *= chunk_images(shape.batch, pixels * columns * 2)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    matrix, dy, y = random(pixels, columns), random(pixels, channels), random(pixels, channels)
    fuse, bias = random(channels, 3 * channels), random(channels)
    total = torch.empty(channels, columns, device=device)
    mixed = matrix[:, : 3 * channels]
    return {
        "y": lambda: torch.addmm(bias, mixed, fuse.t(), out=y),
        "G": lambda: torch.mm(dy, fuse, out=mixed),
        "dF": lambda: add_product(total, dy.t(), matrix, first=False),
    }


def products(context: Context) -> dict[str, Any]:
    """Microseconds of a chunk and TFLOP/s, at every stage."""
    for shape in STAGES:
        pixels = shape.height * shape.width
        pixels *= chunk_images(shape.batch, pixels * matrix_columns(shape.channels) * 2)
        flops = 6 * pixels * shape.channels**2
        found = {name: timing.event_us(call) for name, call in calls_of(shape, "cuda").items()}
        context.so_far[shape.name] = {
            name: {"us": us, "tflops": flops / us / 1e6} for name, us in found.items()
        }
    return context.so_far
