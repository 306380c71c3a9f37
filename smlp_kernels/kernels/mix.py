"""The forward as launches: for every chunk of images both axes, then a product over channels.

    [x_h | x_w | x] = [Ph x + bh | x Pw' + bw | x]    kernels/axis.py
    y = [x_h | x_w | x] [Fh | Fw | Fi]' + bias        PyTorch's product (cuBLAS)

The concatenation is a matrix [pixels, 3C + pad] of a chunk of images only, meant to stay in the L2
cache: GPU memory would then see x read once and y written once.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from smlp_kernels.kernels.axis import Axis, axis_plan, both_axes_plan, matrix_columns, split_batch
from smlp_kernels.kernels.products import run_axis
from smlp_kernels.kernels.rows import Chunk, chunks_of, copy_images, is_rows
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


def mix(x: Tensor, weights: Weights, arch: int, launch: Launch) -> Tensor:
    """The block: [B, C, H, W] in the type and the memory format of ``x``.

    Args:
        x: [B, C, H, W], any strides.
        weights: any floating types, any strides.
        arch: ten times the compute capability of the chip.
        launch: is given every call of a kernel, in order.
    """
    y = torch.empty_like(x)
    channels = x.shape[1]
    proj_h, bias_h, proj_w, bias_w, fuse, bias = weights
    proj_h, proj_w, fuse = in_type_of(x, proj_h, proj_w, fuse)
    proj_h, transposed_h = as_it_lies(proj_h)
    proj_w, transposed_w = as_it_lies(proj_w)
    plan = mix_plan(
        *(x.shape, x.stride(), y.stride(), transposed_h, transposed_w),
        *(x.dtype, input_precision(x.dtype), arch),
    )
    along_h, along_w = (proj_h, dense(bias_h)), (proj_w, dense(bias_w))
    if fuse.is_contiguous():  # one view, not two
        fuse = fuse.as_strided((3 * channels, channels), (1, 3 * channels))
    else:
        fuse = fuse.reshape(channels, -1).t()
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    matrix = x.new_empty(*plan.matrix)  # a tuple takes twice as long
    for chunk in plan.chunks:
        both, plan_h, plan_w = chunk.plans
        x_images = chunk.read(x, plan.x_is_rows, launch)
        y_images = chunk.images(y) if plan.y_is_rows else torch.empty_like(x_images)
        y_rows = chunk.rows(y_images)
        if both is not None:
            launch(Call(both, (matrix, x_images, *along_h, *along_w)))
        else:
            rows, first = matrix[: chunk.pixels], not chunk.first
            run_axis(plan.h, plan_h, (rows, x_images, None, *along_h, None), first, launch)
            run_axis(plan.w, plan_w, (rows, x_images, None, *along_w, None), first, launch)
        mixed = matrix.as_strided((chunk.pixels, 3 * channels), (plan.matrix[1], 1))
        if bias is None:
            torch.mm(mixed, fuse, out=y_rows)
        elif bias.dim() == 1:
            torch.addmm(bias, mixed, fuse, out=y_rows)
        else:  # [C, H, W]
            y_images.copy_(bias)
            torch.addmm(y_rows, mixed, fuse, out=y_rows)
        if not plan.y_is_rows:
            copy_images(y_images, chunk.images(y), launch)
    return y


class MixPlan(NamedTuple):
    """All of a forward but the tensors."""

    x_is_rows: bool  # else it is copied, a chunk at a time
    y_is_rows: bool
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of [x_h | x_w | x | pad]
    h: Axis
    w: Axis


@functools.lru_cache(PLANS)
def mix_plan(
    shape: torch.Size,
    x_strides: Strides,
    y_strides: Strides,
    transposed_h: bool,
    transposed_w: bool,
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> MixPlan:
    """The plan for inputs of a shape, with these strides; how the projections lie."""
    _, channels, height, width = shape
    x_is_rows, y_is_rows = is_rows(shape, x_strides), is_rows(shape, y_strides)

    needs = (False, False, True)
    copies = (not x_is_rows) + (not y_is_rows)
    images, h, w = split_batch(shape, (needs, needs), (copies, 2), dtype, precision, arch)

    def plans(pixels: int, first: bool) -> tuple[Plan | None, ...]:
        both = both_axes_plan(h, w, pixels, (transposed_h, transposed_w))
        if both is not None:
            return both, None, None
        plan_h = axis_plan(h, pixels, first, transposed_h)
        return None, plan_h, axis_plan(w, pixels, first, transposed_w)

    matrix = images * height * width, matrix_columns(channels)
    return MixPlan(x_is_rows, y_is_rows, chunks_of(shape, images, plans), matrix, h, w)
