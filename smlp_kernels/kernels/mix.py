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

from smlp_kernels.kernels.axis import Axis, axis_plan, both_axes_plan, make_axis, matrix_columns
from smlp_kernels.kernels.products import run_axis
from smlp_kernels.kernels.rows import Chunk, chunk_images, chunks_of, is_rows
from smlp_kernels.launch import (
    PLANS,
    Call,
    Launch,
    Plan,
    Strides,
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
    if not x.shape[0]:
        return y
    channels = x.shape[1]
    proj_h, proj_w, fuse = in_type_of(x, weights.proj_h, weights.proj_w, weights.fuse)
    plan = mix_plan(
        x.shape,
        (is_rows(x), is_rows(y)),
        (*proj_h.stride(), *proj_w.stride()),
        x.dtype,
        input_precision(x.dtype),
        arch,
    )
    fuse = fuse.reshape(channels, 3 * channels).t()
    bias = None if weights.bias is None else weights.bias.to(x.dtype)
    bias_h, bias_w = dense(weights.bias_h), dense(weights.bias_w)
    matrix = x.new_empty(plan.matrix)

    def mix_chunk(chunk: Chunk) -> None:
        x_rows = chunk.read(x, plan.rows[0], launch)
        y_rows = chunk.view(y) if plan.rows[1] else torch.empty_like(x_rows)
        mixed = matrix[: chunk.pixels] if chunk.is_short else matrix
        both, along_h, along_w = chunk.plans
        if both is not None:
            launch(Call(both, (mixed, x_rows, proj_h, bias_h, proj_w, bias_w)))
        else:
            for axis, planned, proj, axis_bias in (
                (plan.h, along_h, proj_h, bias_h),
                (plan.w, along_w, proj_w, bias_w),
            ):
                tensors = (mixed, x_rows, None, proj, axis_bias, None)
                run_axis(axis, planned, tensors, chunk.is_first, launch)
        multiply(mixed[:, : 3 * channels], fuse, bias, y_rows)
        if not plan.rows[1]:
            chunk.write(y_rows, y, launch)

    for chunk in plan.chunks:
        mix_chunk(chunk)
    return y


def multiply(mixed: Tensor, fuse: Tensor, bias: Tensor | None, y_rows: Tensor) -> None:
    """y = mixed @ fuse + bias, [pixels, C]; a bias [C, H, W] is added in the product as well."""
    if bias is None:
        torch.mm(mixed, fuse, out=y_rows)
    elif bias.dim() == 1:
        torch.addmm(bias, mixed, fuse, out=y_rows)
    else:
        y_rows.unflatten(0, (-1, *bias.shape[1:])).copy_(bias.movedim(0, 2))
        torch.addmm(y_rows, mixed, fuse, out=y_rows)


class MixPlan(NamedTuple):
    """All of a forward but the tensors."""

    rows: tuple[bool, bool]  # whether x and y are; else they are copied, a chunk at a time
    chunks: tuple[Chunk, ...]
    matrix: tuple[int, int]  # shape of [x_h | x_w | x | pad]
    h: Axis
    w: Axis


@functools.lru_cache(PLANS)
def mix_plan(
    shape: torch.Size,
    rows: tuple[bool, bool],
    proj_strides: Strides,
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> MixPlan:
    """A batch has as few chunks as ``CHUNK_BYTES`` allow, of equal sizes."""
    batch, channels, height, width = shape
    columns = matrix_columns(channels)

    def axes_of(images: int) -> tuple[Axis, Axis]:
        size, needs = (channels, height, width), (False, False, True)
        common = (needs, images, dtype, precision, arch)
        return make_axis(size, True, *common), make_axis(size, False, *common)

    copies = rows.count(False)
    if any(axis.tile is None for axis in axes_of(1)):
        copies += 2  # of run_by_products
    image_bytes = height * width * (columns + copies * channels) * dtype.itemsize
    images = chunk_images(batch, image_bytes)
    h, w = axes_of(images)

    def plans(pixels: int, first: bool) -> tuple[Plan | None, ...]:
        both = both_axes_plan(h, w, pixels, proj_strides)
        if both is not None:
            return both, None, None
        along_h = axis_plan(h, pixels, first, proj_strides[:2])
        return None, along_h, axis_plan(w, pixels, first, proj_strides[2:])

    chunks = chunks_of(shape, images, plans)
    return MixPlan(rows, chunks, (images * height * width, columns), h, w)
