"""The backward as launches: for every chunk of images a product, both axes, a product; then sums.

The formulas are at the top of :mod:`smlp_kernels.kernels.axis`. The products over
channels and over pixels are PyTorch's (cuBLAS); between them is one matrix, [pixels, 3C + pad].
It is that of a chunk of images, meant to stay in the L2 cache. The pad becomes ones, so that the
gradient of the bias is a column of that of ``fuse``.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from smlp_kernels.kernels.axis import Axes, Needed, matrix_columns, split_batch
from smlp_kernels.kernels.narrow import is_narrow, narrow_plans
from smlp_kernels.kernels.products import add_products, parts_of, run_by_products
from smlp_kernels.kernels.rows import Chunk, chunks_of, copy_images, is_rows
from smlp_kernels.kernels.weight_sums import weight_sums_plan
from smlp_kernels.launch import PLANS, Call, Launch, Plan, input_precision
from smlp_kernels.weights import Weights, as_read

Grads = tuple[Tensor, ...]


def mix_backward(
    dy: Tensor,
    x: Tensor,
    weights: Weights,
    needed: Needed,
    arch: int,
    launch: Launch,
) -> Grads:
    """Gradients of x and of the six weights; empty tensors in place of those not needed.

    Args:
        dy: [B, C, H, W], any strides; of the type of ``x``.
        x: [B, C, H, W], any strides.
        weights: those of the forward; its bias has no effect.
        needed: what is computed.
        arch: ten times the compute capability of the chip.
        launch: is given every call of a kernel, in order.
    """
    grads = empty_grads(x, weights, needed)
    dx = grads[0]
    if not (any(needed) and x.shape[0]):
        return tuple(grad.zero_() for grad in grads)
    shape, dtype = x.shape, x.dtype
    along_h, along_w, fuse = as_read(x, weights)
    rows = is_rows(dy), not any(needed[1:]) or is_rows(x), not needed.x or is_rows(dx)
    plan = backward_plan(shape, rows, needed, dtype, input_precision(dtype), arch)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    total = x.new_empty(*plan.total, dtype=acc)
    partial_h = total.new_empty(*plan.partial_h)  # naming the type takes as long again
    partial_w = total.new_empty(*plan.partial_w)
    sums = Call(plan.sums, (partial_h, partial_w, total, *grads[1:]))
    if plan.narrow is not None:
        h, w = plan.narrow
        fuse = fuse.contiguous()
        launch(Call(h, (dy, x, dx, *along_h, fuse, None, partial_h, total)))
        launch(Call(w, (dy, x, dx, *along_w, fuse, None, partial_w, total)))
        launch(sums)
        return grads
    dy_is_rows, x_is_rows, dx_is_rows = rows
    start, end = plan.branches
    channels = shape[1]
    if not fuse.is_contiguous():
        fuse = fuse.reshape(channels, -1)[:, start:end]
    elif end:
        offset = fuse.storage_offset() + start
        fuse = fuse.as_strided((channels, end - start), (3 * channels, 1), offset)
    columns = plan.matrix[1]
    matrix = x.new_empty(*plan.matrix)
    weights_and_sums = (
        *(*along_h, partial_h if needed.proj_h else None),
        *(*along_w, partial_w if needed.proj_w else None),
    )
    dx_images = None
    for chunk in plan.chunks:
        dy_images = chunk.read(dy, dy_is_rows, launch)
        x_images = chunk.read(x, x_is_rows, launch) if plan.reads_x else None
        if needed.x:
            dx_images = chunk.images(dx) if dx_is_rows else torch.empty_like(dy_images)
        if end:
            product = matrix.as_strided((chunk.pixels, end - start), (columns, 1), start)
            torch.mm(chunk.matrix(dy_images), fuse, out=product)
        tensors = matrix, x_images, dx_images, *weights_and_sums
        for along in chunk.plans:
            if isinstance(along, Plan):
                launch(Call(along, tensors))
            else:
                run_by_products(plan.axes, chunk, along, tensors)
        if needed.fuse:
            parts = plan.total[0]
            size = chunk.pixels // parts
            dy_parts = dy_images.as_strided((parts, channels, size), (size * channels, 1, channels))
            g_parts = matrix.as_strided((parts, size, columns), (size * columns, columns, 1))
            add_products(total, dy_parts, g_parts, not chunk.first)
        if not dx_is_rows:
            copy_images(dx_images, chunk.images(dx), launch)
    if plan.reads_x:
        launch(sums)
    return grads


def empty_grads(x: Tensor, weights: Weights, needed: Needed) -> Grads:
    """Tensors for the gradients of x and of the six weights; empty where not needed."""

    def pair(weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        shape = weight.shape if wanted else (0,)
        if wanted and weight.is_contiguous():  # with its strides where a size is 1: DDP compares
            return torch.empty_like(weight), weight.new_empty(shape[0])
        return weight.new_empty(*shape), weight.new_empty(shape[0])

    dx = torch.empty_like(x) if needed.x else x.new_empty(0)
    along_h = pair(weights.proj_h, needed.proj_h)
    along_w = pair(weights.proj_w, needed.proj_w)
    return dx, *along_h, *along_w, *pair(weights.fuse, needed.fuse)


class BackwardPlan(NamedTuple):
    """All of a backward but the tensors."""

    narrow: tuple[Plan, Plan] | None  # along H and W, instead of the chunks
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of the matrix between the products
    branches: tuple[int, int]  # its columns that the first product fills
    total: tuple[int, int, int]  # shape of the second product, in parts
    partial_h: tuple[int, int]  # shapes of what the programs along H and W add up
    partial_w: tuple[int, int]
    axes: Axes
    reads_x: bool
    sums: Plan


@functools.lru_cache(PLANS)
def backward_plan(
    shape: torch.Size,
    rows: tuple[bool, bool, bool],
    needed: Needed,
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> BackwardPlan:
    """The plan for inputs of a shape.

    ``rows`` says whether dy, x and dx are, as far as they are needed; others are copied, a chunk at
    a time.
    """
    _, channels, height, width = shape
    columns = matrix_columns(channels)
    copies = rows.count(False), 4
    images, axes = split_batch(shape, needed, copies, dtype, precision, arch)
    chunks = chunks_of(shape, images, axes.plans)
    start = 0 if needed.x or needed.proj_h else channels
    branches = 3 if needed.x else 2 if needed.proj_w else 1 if needed.proj_h else 0
    narrow = None
    if all(rows) and all(needed) and is_narrow(shape, dtype, arch):
        narrow = h, w = narrow_plans(shape, backward=True)
        sums_h, sums_w, parts, parts_at_a_time = h.programs, w.programs, h.integers[1], 32
        total = parts, channels, 3 * channels + 1
    else:
        sums_h = axes.programs[0] if needed.proj_h else 0
        sums_w = axes.programs[1] if needed.proj_w else 0
        pixels = math.gcd(*(chunk.pixels for chunk in chunks))
        parts, parts_at_a_time = parts_of(channels, columns, pixels) if needed.fuse else 0, 1
        total = parts, channels, columns
    return BackwardPlan(
        narrow=narrow,
        chunks=chunks,
        matrix=(images * height * width, columns),
        branches=(start, branches * channels),
        total=total,
        partial_h=(sums_h, height * (height + 1)),
        partial_w=(sums_w, width * (width + 1)),
        axes=axes,
        reads_x=any(needed[1:]),
        sums=weight_sums_plan(axes.size, (sums_h, sums_w), total, parts_at_a_time),
    )
