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

from smlp_kernels.kernels.axis import FORWARD, Axes, matrix_columns, split_batch
from smlp_kernels.kernels.narrow import is_narrow, narrow_plans
from smlp_kernels.kernels.products import run_by_products
from smlp_kernels.kernels.rows import Chunk, chunks_of, copy_images, is_rows
from smlp_kernels.launch import PLANS, Call, Launch, Plan, input_precision
from smlp_kernels.weights import as_read, dense


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
    along_h, along_w, fuse = as_read(x, weights)
    has_map = bias is not None and bias.dim() == 3
    x_is_rows = is_rows(x)
    y_is_rows = x_is_rows or is_rows(y)
    plan = mix_plan(shape, (x_is_rows, y_is_rows), has_map, dtype, input_precision(dtype), arch)
    if plan.narrow is not None:
        h, w = plan.narrow
        fuse, bias = fuse.contiguous(), dense(bias.permute(1, 2, 0) if has_map else bias)
        launch(Call(h, (x, None, y, *along_h, fuse, None, None, None)))
        launch(Call(w, (x, None, y, *along_w, fuse, bias, None, None)))
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
        x_images = chunk.read(x, x_is_rows, launch)
        y_images = chunk.images(y) if y_is_rows else torch.empty_like(x_images)
        y_rows = chunk.matrix(y_images)
        tensors = matrix, x_images, None, *along_h, None, *along_w, None
        for along in chunk.plans:
            if isinstance(along, Plan):
                launch(Call(along, tensors))
            else:
                run_by_products(plan.axes, chunk, along, tensors)
        mixed = matrix.as_strided((chunk.pixels, 3 * channels), (plan.matrix[1], 1))
        if bias is None:
            torch.mm(mixed, fuse, out=y_rows)
        elif has_map:
            y_images.copy_(bias)
            torch.addmm(y_rows, mixed, fuse, out=y_rows)
        else:
            torch.addmm(bias, mixed, fuse, out=y_rows)
        if not y_is_rows:
            copy_images(y_images, chunk.images(y), launch)
    return y


class MixPlan(NamedTuple):
    """All of a forward but the tensors."""

    narrow: tuple[Plan, Plan] | None  # along H and W; the rest is then not used
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of [x_h | x_w | x | pad]
    axes: Axes


@functools.lru_cache(PLANS)
def mix_plan(
    shape: torch.Size,
    rows: tuple[bool, bool],
    has_map: bool,
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> MixPlan:
    """The plan for inputs of a shape.

    ``rows`` says whether x and y are rows; otherwise they are copied, a chunk at a time.
    ``has_map`` says whether there is a bias of every pixel.
    """
    narrow = None
    if all(rows) and is_narrow(shape, dtype, arch):
        narrow = narrow_plans(shape, backward=False, bias_map=has_map)
    _, channels, height, width = shape
    copies = rows.count(False), 2
    images, axes = split_batch(shape, FORWARD, copies, dtype, precision, arch)
    chunks = chunks_of(shape, images, axes.plans)
    return MixPlan(narrow, chunks, (images * height * width, matrix_columns(channels)), axes)
