"""The backward as launches: for every chunk of images a product, both axes, a product; then sums.

What is computed is written at the head of :mod:`smlp_kernels.kernels.axis`. The products over
channels and over pixels are PyTorch's (cuBLAS); between them lies one matrix, [pixels, 3C + pad].
It is that of a chunk of images, meant to stay in the L2 cache. The pad becomes ones, so that the
gradient of the bias is a column of that of ``fuse``.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from smlp_kernels.kernels.axis import Axis, axis_plan, matrix_columns, split_batch
from smlp_kernels.kernels.products import add_products, parts_of, run_axis
from smlp_kernels.kernels.rows import Chunk, chunks_of, copy_images, is_rows
from smlp_kernels.kernels.weight_sums import weight_sums_plan
from smlp_kernels.launch import (
    PLANS,
    Call,
    Launch,
    Plan,
    Strides,
    as_it_lies,
    dense,
    in_type_of,
    input_precision,
)
from smlp_kernels.weights import Weights

Grads = tuple[Tensor, ...]


class Needed(NamedTuple):
    """Which gradients are wanted; that of a weight always comes with that of its bias."""

    x: bool
    proj_h: bool
    proj_w: bool
    fuse: bool


def mix_backward(
    dy: Tensor,
    x: Tensor,
    weights: Weights,
    needed: Needed,
    arch: int,
    launch: Launch,
) -> Grads:
    """Gradients of x and of the six weights; empty tensors in the place of those not needed.

    Args:
        dy: [B, C, H, W], any strides; of the type of ``x``.
        x: [B, C, H, W], any strides.
        weights: those of the forward; its bias plays no part.
        needed: what is computed.
        arch: ten times the compute capability of the chip.
        launch: is given every call of a kernel, in order.
    """
    grads = empty_grads(x, weights, needed)
    dx = grads[0]
    if not (any(needed) and x.shape[0]):
        return tuple(grad.zero_() for grad in grads)
    proj_h, bias_h, proj_w, bias_w, fuse, _ = weights
    proj_h, proj_w, fuse = in_type_of(x, proj_h, proj_w, fuse)
    proj_h, transposed_h = as_it_lies(proj_h)
    proj_w, transposed_w = as_it_lies(proj_w)
    plan = backward_plan(
        *(x.shape, dy.stride(), x.stride(), dx.stride(), needed, transposed_h, transposed_w),
        *(x.dtype, input_precision(x.dtype), arch),
    )
    start, end = plan.branches
    channels = x.shape[1]
    if not fuse.is_contiguous():
        fuse = fuse.reshape(channels, -1)[:, start:end]
    elif end:
        offset = fuse.storage_offset() + start
        fuse = fuse.as_strided((channels, end - start), (3 * channels, 1), offset)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = plan.matrix[1]
    matrix = x.new_empty(*plan.matrix)
    total = x.new_empty(*plan.total, dtype=acc)
    partial_h = x.new_empty(*plan.h.partial, dtype=acc)
    partial_w = x.new_empty(*plan.w.partial, dtype=acc)
    along_h = proj_h, dense(bias_h), partial_h if plan.h.need_proj else None
    along_w = proj_w, dense(bias_w), partial_w if plan.w.need_proj else None
    dx_images = None
    for chunk in plan.chunks:
        first = not chunk.first
        dy_images = chunk.read(dy, plan.dy_is_rows, launch)
        dy_rows = chunk.rows(dy_images)
        x_images = chunk.read(x, plan.x_is_rows, launch) if plan.reads_x else None
        if needed.x:
            dx_images = chunk.images(dx) if plan.dx_is_rows else torch.empty_like(dy_images)
        g = matrix if chunk.pixels == len(matrix) else matrix[: chunk.pixels]
        if end:
            product = g.as_strided((chunk.pixels, end - start), (columns, 1), start)
            torch.mm(dy_rows, fuse, out=product)
        plan_h, plan_w = chunk.plans
        run_axis(plan.h, plan_h, (g, x_images, None, *along_h), first, launch)
        run_axis(plan.w, plan_w, (g, x_images, dx_images, *along_w), first, launch)
        if needed.fuse:
            parts = plan.total[0]
            size = chunk.pixels // parts
            dy_parts = dy_images.as_strided((parts, channels, size), (size * channels, 1, channels))
            g_parts = g.as_strided((parts, size, columns), (size * columns, columns, 1))
            add_products(total, dy_parts, g_parts, first)
        if not plan.dx_is_rows:
            copy_images(dx_images, chunk.images(dx), launch)
    if plan.reads_x:
        launch(Call(plan.sums, (partial_h, partial_w, total, *grads[1:])))
    return grads


def empty_grads(x: Tensor, weights: Weights, needed: Needed) -> Grads:
    """Tensors for the gradients of x and of the six weights; empty where not needed."""
    grads = [torch.empty_like(x) if needed.x else x.new_empty(0)]
    matrices = (weights.proj_h, weights.proj_w, weights.fuse)
    for weight, wanted in zip(matrices, needed[1:], strict=True):
        shape = weight.shape if wanted else (0,)
        grads += weight.new_empty(*shape), weight.new_empty(shape[0])
    return tuple(grads)


class BackwardPlan(NamedTuple):
    """All of a backward but the tensors."""

    dy_is_rows: bool  # else it is copied, a chunk at a time
    x_is_rows: bool
    dx_is_rows: bool
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of the matrix between the products
    branches: tuple[int, int]  # its columns that the first product fills
    total: tuple[int, int, int]  # shape of the second product, in parts
    h: Axis
    w: Axis
    reads_x: bool
    sums: Plan


@functools.lru_cache(PLANS)
def backward_plan(
    shape: torch.Size,
    dy_strides: Strides,
    x_strides: Strides,
    dx_strides: Strides,
    needed: Needed,
    transposed_h: bool,
    transposed_w: bool,
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> BackwardPlan:
    """The plan for inputs of a shape, with these strides; how the projections lie."""
    _, channels, height, width = shape
    columns = matrix_columns(channels)
    reads_x = any(needed[1:])
    dy_is_rows, x_is_rows = is_rows(shape, dy_strides), is_rows(shape, x_strides)
    dx_is_rows = not needed.x or is_rows(shape, dx_strides)
    copies = (not dy_is_rows) + (reads_x and not x_is_rows) + (not dx_is_rows)
    needs = tuple(
        (needed.x, need_proj, needed.fuse) for need_proj in (needed.proj_h, needed.proj_w)
    )
    images, h, w = split_batch(shape, needs, (copies, 4), dtype, precision, arch)

    def plans(pixels: int, first: bool) -> tuple[Plan | None, Plan | None]:
        plan_h = axis_plan(h, pixels, first, transposed_h)
        return plan_h, axis_plan(w, pixels, first, transposed_w)

    chunks = chunks_of(shape, images, plans)
    pixels = math.gcd(*(chunk.pixels for chunk in chunks))
    parts = parts_of(channels, columns, pixels) if needed.fuse else 0
    total = parts, channels, columns
    start = 0 if needed.x or needed.proj_h else channels
    branches = 3 if needed.x else 2 if needed.proj_w else 1 if needed.proj_h else 0
    return BackwardPlan(
        dy_is_rows=dy_is_rows,
        x_is_rows=x_is_rows,
        dx_is_rows=dx_is_rows,
        chunks=chunks,
        matrix=(images * height * width, columns),
        branches=(start, branches * channels),
        total=total,
        h=h,
        w=w,
        reads_x=reads_x,
        sums=weight_sums_plan(h.size, total, h.partial[0], w.partial[0]),
    )
