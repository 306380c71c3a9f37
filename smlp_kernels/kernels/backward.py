"""The backward as launches: for every chunk of images a product, both axes, a product; then sums.

What is computed is written at the head of :mod:`smlp_kernels.kernels.axis_grad`. The products over
channels and over pixels are PyTorch's (cuBLAS); between them lies one matrix, [pixels, 3C + pad].
It is that of a chunk of images, which keeps it in the L2 cache. The pad becomes ones, so that the
gradient of the bias is a column of that of ``fuse``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from smlp_kernels.kernels.axis_grad import Axis, axis_grad_plan, axis_tile
from smlp_kernels.kernels.weight_sums import weight_sums_plan
from smlp_kernels.launch import PLANS, Call, Plan, dense, in_type_of, input_precision
from smlp_kernels.weights import Weights

CHUNK_BYTES = 33 * 2**20  # of scratch memory, unless a single image takes more

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
    launch: Callable[[Call], None],
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
    if not (any(needed) and len(x)):
        return tuple(grad.zero_() for grad in grads)
    dx = grads[0]
    rows = (is_rows(dy), is_rows(x), is_rows(dx))
    plan = backward_plan(x.shape, rows, needed, x.dtype, input_precision(x.dtype), arch)
    start, end = plan.branches
    proj_h, proj_w, fuse = in_type_of(x, weights.proj_h, weights.proj_w, weights.fuse)
    fuse = fuse.reshape(len(fuse), -1)[:, start:end]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrix = x.new_empty(plan.matrix)
    total = x.new_empty(plan.total, dtype=acc)
    partial_h = x.new_empty(plan.h.partial, dtype=acc)
    partial_w = x.new_empty(plan.w.partial, dtype=acc)
    axes = (
        (plan.h, proj_h, dense(weights.bias_h), partial_h),
        (plan.w, proj_w, dense(weights.bias_w), partial_w),
    )

    def add_chunk(first: int) -> None:
        """The gradient of x for some images, and their part in those of the weights."""
        dy_rows = rows_of(dy, first, plan.images)
        x_rows = rows_of(x, first, plan.images) if plan.reads_x else None
        dx_rows = None
        if needed.x:
            dx_rows = rows_of(dx, first, plan.images) if rows[2] else torch.empty_like(dy_rows)
        g = matrix[: len(dy_rows)]
        if end:
            torch.mm(dy_rows, fuse, out=g[:, start:end])
        for axis, proj, bias, partial in axes:
            tensors = (g, x_rows, None if axis.along_h else dx_rows, proj, bias)
            if axis.tile is None:
                axis_by_products(axis, *tensors, partial, first == 0)
            elif axis.need_x or axis.need_proj or axis.need_fuse:
                axis_plan = axis_grad_plan(axis, len(g), first == 0, proj.stride())
                launch(Call(axis_plan, (*tensors, partial if axis.need_proj else None)))
        if needed.fuse:
            add_product(total, dy_rows.t(), g, first == 0)
        if dx_rows is not None and not rows[2]:
            images = dx_rows.unflatten(0, (-1, *dx.shape[2:]))
            dx[first : first + plan.images] = images.movedim(3, 1)

    for first in range(0, len(x), plan.images):
        add_chunk(first)
    if plan.reads_x:
        launch(Call(plan.sums, (partial_h, partial_w, total, *grads[1:])))
    return grads


def empty_grads(x: Tensor, weights: Weights, needed: Needed) -> Grads:
    """Tensors for the gradients of x and of the six weights; empty where not needed."""
    grads = [torch.empty_like(x) if needed.x else x.new_empty(0)]
    matrices = (weights.proj_h, weights.proj_w, weights.fuse)
    for weight, wanted in zip(matrices, needed[1:], strict=True):
        grads.append(x.new_empty(weight.shape if wanted else 0, dtype=weight.dtype))
        grads.append(x.new_empty(weight.shape[0] if wanted else 0, dtype=weight.dtype))
    return tuple(grads)


class BackwardPlan(NamedTuple):
    """All of a backward but the tensors."""

    images: int  # of a chunk
    matrix: tuple[int, int]  # shape of the matrix between the products
    branches: tuple[int, int]  # its columns that the first product fills
    total: tuple[int, int]  # shape of the second product
    h: Axis
    w: Axis
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
    """The plan for tensors of which dy, x and dx are ``rows`` or have to be copied.

    A batch has as few chunks as ``CHUNK_BYTES`` allow, of equal sizes.
    """
    batch, channels, height, width = shape
    columns = triton.cdiv(3 * channels + 1, 8) * 8  # a row starts at a multiple of 16 bytes
    reads_x = any(needed[1:])
    tile_h = axis_tile(height, channels, dtype, arch)
    tile_w = axis_tile(width, channels, dtype, arch)
    copies = [not r and wanted for r, wanted in zip(rows, (True, reads_x, needed.x), strict=True)]
    scratch = columns + channels * sum(copies)
    if tile_h is None or tile_w is None:
        scratch += 4 * channels  # of axis_by_products
    image_bytes = height * width * scratch * dtype.itemsize
    images = triton.cdiv(batch, triton.cdiv(batch, max(1, CHUNK_BYTES // image_bytes)))

    def axis_of(along_h: bool) -> Axis:
        lines, tile = (width, tile_h) if along_h else (height, tile_w)
        programs = 1
        if tile is not None:
            programs = min(tile.programs, tile.tiles(images * lines, channels))
        return Axis(
            size=(channels, height, width),
            columns=columns,
            along_h=along_h,
            need_x=needed.x,
            need_proj=needed.proj_h if along_h else needed.proj_w,
            need_fuse=needed.fuse,
            tile=tile,
            programs=programs,
            precision=precision,
        )

    start = 0 if needed.x or needed.proj_h else channels
    branches = 3 if needed.x else 2 if needed.proj_w else 1 if needed.proj_h else 0
    h, w = axis_of(along_h=True), axis_of(along_h=False)
    return BackwardPlan(
        images=images,
        matrix=(images * height * width, columns),
        branches=(start, branches * channels),
        total=(channels if needed.fuse else 0, columns),
        h=h,
        w=w,
        reads_x=reads_x,
        sums=weight_sums_plan(h.size, columns, h.partial[0], w.partial[0], needed.fuse),
    )


def is_rows(x: Tensor) -> bool:
    """Whether [B, C, H, W] is a dense matrix [pixels, C]."""
    return x.is_contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor, first: int, images: int) -> Tensor:
    """Images from ``first`` as a dense matrix [pixels, C]: a view if ``is_rows``, else a copy."""
    batch, channels, height, width = x.shape
    if is_rows(x):
        image, pixels = height * width * channels, min(images, batch - first) * height * width
        return x.as_strided((pixels, channels), (channels, 1), x.storage_offset() + first * image)
    return x[first : first + images].permute(0, 2, 3, 1).reshape(-1, channels).contiguous()


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total (+)= left @ right, added up in the type of ``total`` throughout."""
    if left.dtype == total.dtype or not left.is_cuda:  # only CUDA has products of mixed types
        left, right = left.to(total.dtype), right.to(total.dtype)
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def axis_by_products(
    axis: Axis,
    g: Tensor,
    x_rows: Tensor | None,
    dx_rows: Tensor | None,
    proj: Tensor,
    bias: Tensor | None,
    partial: Tensor,
    first: bool,
) -> None:
    """What ``axis_grad_kernel`` does, by PyTorch's products: for an axis that no tile holds."""
    channels, height, width = axis.size

    def positions(rows: Tensor) -> Tensor:
        """A view [positions, images, lines of an image, channels]."""
        return rows.unflatten(0, (-1, height, width)).movedim(1 if axis.along_h else 2, 0)

    start = 0 if axis.along_h else channels
    branch = positions(g[:, start : start + channels])
    identity = positions(g[:, 2 * channels : 3 * channels])
    size = len(proj)
    out = g.new_empty(size, branch[0].numel())
    if axis.need_x or axis.need_proj:
        g_lines = branch.flatten(1)  # [positions, all lines and channels]
    if axis.need_x:
        torch.addmm(identity.flatten(1), proj.t(), g_lines, out=out)
        (identity if dx_rows is None else positions(dx_rows)).copy_(out.view_as(identity))
    if x_rows is None:
        return
    x = positions(x_rows)
    if axis.need_proj:
        grad, bias_grad = partial.view(size + 1, size).split((size, 1))
        add_product(grad, g_lines, x.flatten(1).t(), first)
        sums = g_lines.sum(1, dtype=partial.dtype)
        bias_grad.copy_(sums if first else bias_grad + sums)
    if axis.need_fuse:
        if bias is None:
            torch.mm(proj, x.flatten(1), out=out)
        else:
            torch.addmm(bias.to(g.dtype)[:, None], proj, x.flatten(1), out=out)
        branch.copy_(out.view_as(branch))
        if not axis.along_h:
            identity.copy_(x)
            g[:, 3 * channels :] = 1
