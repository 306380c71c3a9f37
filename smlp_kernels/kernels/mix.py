"""The forward as launches: for every chunk of images both axes, then a product over channels.

    [x_h | x_w | x] = [Ph x + bh | x Pw' + bw | x]    kernels/axis.py
    y = [x_h | x_w | x] [Fh | Fw | Fi]' + bias        PyTorch's product (cuBLAS)

The concatenation is a matrix [pixels, 3C + pad] of a chunk of images only, meant to stay in the L2
cache: GPU memory would then see x read once and y written once.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smlp_kernels.kernels.axis import Axis, axis_plan, both_axes_plan, matrix_columns, split_batch
from smlp_kernels.kernels.narrow import is_narrow, narrow_mix
from smlp_kernels.kernels.products import run_axis
from smlp_kernels.kernels.rows import Chunk, chunks_of, copy_images, is_rows
from smlp_kernels.launch import PLANS, Call, Launch, Plan, input_precision
from smlp_kernels.weights import as_read


def mix(x: Tensor, weights: Sequence[Any], arch: int, launch: Launch) -> Tensor:
    """The block: [B, C, H, W] in the type and the memory format of ``x``.

    Args:
        x: [B, C, H, W], any strides.
        weights: the six of :class:`smlp_kernels.weights.Weights`.
        arch: ten times the compute capability of the chip.
        launch: is given every call of a kernel, in order.
    """
    y = torch.empty_like(x)
    shape, dtype, bias = x.shape, x.dtype, weights[5]
    read = as_read(x, weights)
    along_h, along_w, transposed, fuse = read
    x_is_rows = is_rows(x)
    y_is_rows = x_is_rows or is_rows(y)
    plan = mix_plan(shape, (x_is_rows, y_is_rows), transposed, dtype, input_precision(dtype), arch)
    if plan.is_narrow:
        narrow_mix(x, y, read, bias, launch)
        return y
    channels = shape[1]
    if fuse.is_contiguous():  # one view, not two
        fuse = fuse.as_strided((3 * channels, channels), (1, 3 * channels))
    else:
        fuse = fuse.reshape(channels, -1).t()
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    matrix = x.new_empty(*plan.matrix)  # a tuple takes twice as long
    for chunk in plan.chunks:
        both, plan_h, plan_w = chunk.plans
        x_images = chunk.read(x, x_is_rows, launch)
        y_images = chunk.images(y) if y_is_rows else torch.empty_like(x_images)
        y_rows = chunk.matrix(y_images)
        if both is not None:
            launch(Call(both, (matrix, x_images, *along_h, *along_w)))
        else:
            g, first = matrix[: chunk.pixels], not chunk.first
            run_axis(plan.h, plan_h, (g, x_images, None, *along_h, None), first, launch)
            run_axis(plan.w, plan_w, (g, x_images, None, *along_w, None), first, launch)
        mixed = matrix.as_strided((chunk.pixels, 3 * channels), (plan.matrix[1], 1))
        if bias is None:
            torch.mm(mixed, fuse, out=y_rows)
        elif bias.dim() == 1:
            torch.addmm(bias, mixed, fuse, out=y_rows)
        else:  # [C, H, W]
            y_images.copy_(bias)
            torch.addmm(y_rows, mixed, fuse, out=y_rows)
        if not y_is_rows:
            copy_images(y_images, chunk.images(y), launch)
    return y


class MixPlan(NamedTuple):
    """All of a forward but the tensors."""

    is_narrow: bool  # the rest then plays no part
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of [x_h | x_w | x | pad]
    h: Axis
    w: Axis


@functools.lru_cache(PLANS)
def mix_plan(
    shape: torch.Size,
    rows: tuple[bool, bool],
    transposed: tuple[bool, bool],
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> MixPlan:
    """The plan for inputs of a shape.

    ``rows`` says whether x and y are; others are copied, a chunk at a time. ``transposed`` says
    whether the projections along H and W are.
    """
    _, channels, height, width = shape
    needs = (False, False, True)
    copies = rows.count(False), 2
    images, h, w = split_batch(shape, (needs, needs), copies, dtype, precision, arch)

    def plans(pixels: int, first: bool) -> tuple[Plan | None, ...]:
        both = both_axes_plan(h, w, pixels, transposed)
        if both is not None:
            return both, None, None
        plan_h = axis_plan(h, pixels, first, transposed[0])
        return None, plan_h, axis_plan(w, pixels, first, transposed[1])

    matrix = images * height * width, matrix_columns(channels)
    narrow = all(rows) and is_narrow(shape, dtype, arch)
    return MixPlan(narrow, chunks_of(shape, images, plans), matrix, h, w)
