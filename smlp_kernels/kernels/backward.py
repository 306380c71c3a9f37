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
from smlp_kernels.launch import PLANS, Call, Plan, Strides, dense, in_type_of, input_precision
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
    dx = grads[0]
    if not (any(needed) and x.shape[0]):
        return tuple(grad.zero_() for grad in grads)
    proj_h, proj_w, fuse = in_type_of(x, weights.proj_h, weights.proj_w, weights.fuse)
    plan = backward_plan(
        x.shape,
        Rows(is_rows(dy), is_rows(x), is_rows(dx)),
        needed,
        (proj_h.stride(), proj_w.stride()),
        x.dtype,
        input_precision(x.dtype),
        arch,
    )
    channels = x.shape[1]
    start, end = plan.branches
    if fuse.dim() != 2 or end - start != fuse.shape[1]:
        fuse = fuse.reshape(channels, -1)[:, start:end]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrix = x.new_empty(plan.matrix)
    total = x.new_empty(plan.total, dtype=acc)
    partial_h = x.new_empty(plan.h.partial, dtype=acc)
    partial_w = x.new_empty(plan.w.partial, dtype=acc)
    axes = (
        (plan.h, proj_h, dense(weights.bias_h), partial_h),
        (plan.w, proj_w, dense(weights.bias_w), partial_w),
    )

    def add_chunk(chunk: Chunk) -> None:
        """The gradient of x for some images, and their part in those of the weights."""
        dy_rows = chunk.rows_of(dy, plan.rows.dy)
        x_rows = chunk.rows_of(x, plan.rows.x) if plan.reads_x else None
        dx_rows = None
        if needed.x:
            dx_rows = chunk.rows_of(dx, True) if plan.rows.dx else torch.empty_like(dy_rows)
        dy_rows = dy_rows.view(chunk.pixels, channels)
        g = matrix[: chunk.pixels] if chunk.is_short else matrix
        if end:
            torch.mm(dy_rows, fuse, out=g[:, start:end])
        for axis, proj, bias, partial in axes:
            tensors = (g, x_rows, None if axis.along_h else dx_rows, proj, bias)
            axis_plan = chunk.h if axis.along_h else chunk.w
            if axis_plan is not None:
                launch(Call(axis_plan, (*tensors, partial if axis.need_proj else None)))
            elif axis.is_needed:
                axis_by_products(axis, *tensors, partial, chunk.is_first)
        if needed.fuse:
            add_product(total, dy_rows.t(), g, chunk.is_first)
        if dx_rows is not None and not plan.rows.dx:
            dx[chunk.first : chunk.end] = dx_rows.movedim(3, 1)

    for chunk in plan.chunks:
        add_chunk(chunk)
    if plan.reads_x:
        launch(Call(plan.sums, (partial_h, partial_w, total, *grads[1:])))
    return grads


def empty_grads(x: Tensor, weights: Weights, needed: Needed) -> Grads:
    """Tensors for the gradients of x and of the six weights; empty where not needed."""
    grads = [torch.empty_like(x) if needed.x else x.new_empty(0)]
    matrices = (weights.proj_h, weights.proj_w, weights.fuse)
    for weight, wanted in zip(matrices, needed[1:], strict=True):
        shape = weight.shape if wanted else (0,)
        grads += weight.new_empty(shape), weight.new_empty(shape[0])
    return tuple(grads)


class Rows(NamedTuple):
    """Which tensors are dense matrices [pixels, C]; others are copied, a chunk at a time."""

    dy: bool
    x: bool
    dx: bool


def is_rows(x: Tensor) -> bool:
    """Whether [B, C, H, W] is a dense matrix [pixels, C]."""
    return x.is_contiguous(memory_format=torch.channels_last)


class Chunk(NamedTuple):
    """Some images of a batch."""

    first: int  # images
    end: int
    pixels: int
    is_first: bool
    is_short: bool  # of fewer images than the others
    is_all: bool  # of the batch
    h: Plan | None  # of axis_grad_kernel, if it runs
    w: Plan | None

    def rows_of(self, x: Tensor, is_rows: bool) -> Tensor:
        """Its part of [B, C, H, W] as [images, H, W, C], which is dense: a view or a copy."""
        if not self.is_all:
            x = x[self.first : self.end]
        x = x.permute(0, 2, 3, 1)
        return x if is_rows else x.contiguous()


class BackwardPlan(NamedTuple):
    """All of a backward but the tensors."""

    rows: Rows
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of the matrix between the products
    branches: tuple[int, int]  # its columns that the first product fills
    total: tuple[int, int]  # shape of the second product
    h: Axis
    w: Axis
    reads_x: bool
    sums: Plan


def matrix_columns(channels: int) -> int:
    """Of the matrix between the products: every row starts at a multiple of 16 bytes."""
    return triton.cdiv(3 * channels + 1, 8) * 8


@functools.lru_cache(PLANS)
def backward_plan(
    shape: torch.Size,
    rows: Rows,
    needed: Needed,
    proj_strides: tuple[Strides, Strides],
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> BackwardPlan:
    """A batch has as few chunks as ``CHUNK_BYTES`` allow, of equal sizes."""
    batch, channels, height, width = shape
    columns = matrix_columns(channels)
    reads_x = any(needed[1:])
    tile_h = axis_tile(height, channels, dtype, arch)
    tile_w = axis_tile(width, channels, dtype, arch)
    copies = (not rows.dy) + (reads_x and not rows.x) + (needed.x and not rows.dx)
    if tile_h is None or tile_w is None:
        copies += 4  # of axis_by_products
    image_bytes = height * width * (columns + copies * channels) * dtype.itemsize
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

    h, w = axis_of(along_h=True), axis_of(along_h=False)

    def chunk_of(first: int) -> Chunk:
        end = min(first + images, batch)
        pixels = (end - first) * height * width
        plans = (
            axis_grad_plan(axis, pixels, first == 0, strides)
            for axis, strides in zip((h, w), proj_strides, strict=True)
        )
        return Chunk(first, end, pixels, first == 0, end - first < images, images == batch, *plans)

    start = 0 if needed.x or needed.proj_h else channels
    branches = 3 if needed.x else 2 if needed.proj_w else 1 if needed.proj_h else 0
    return BackwardPlan(
        rows=rows,
        chunks=tuple(map(chunk_of, range(0, batch, images))),
        matrix=(images * height * width, columns),
        branches=(start, branches * channels),
        total=(channels if needed.fuse else 0, columns),
        h=h,
        w=w,
        reads_x=reads_x,
        sums=weight_sums_plan(h.size, columns, h.partial[0], w.partial[0], needed.fuse),
    )


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

    def positions(images: Tensor) -> Tensor:
        """A view [positions, images, lines of an image, channels] of [images, H, W, C]."""
        return images.movedim(1 if axis.along_h else 2, 0)

    branches = positions(g.unflatten(0, (-1, height, width)))
    start = 0 if axis.along_h else channels
    branch = branches[..., start : start + channels]
    identity = branches[..., 2 * channels : 3 * channels]
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
            branches[..., 3 * channels :] = 1
