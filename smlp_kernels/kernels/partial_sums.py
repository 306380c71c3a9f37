"""The sums over partial results, which become the gradients of the weights."""

import triton
import triton.language as tl


@triton.jit
def sum_columns(
    partial_ptr, weight_ptr, bias_ptr, block, splits,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr,  # of a partial result: these, then those
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up a block of columns of [splits, WEIGHTS + BIASES], ROWS of them at a time."""
    SIZE: tl.constexpr = WEIGHTS + BIASES
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    for first in range(0, splits, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < splits)[:, None] & (column < SIZE)[None, :]
        offsets = row.to(tl.int64)[:, None] * SIZE + column[None, :]
        acc += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    tl.store(weight_ptr + column, total, mask=column < WEIGHTS)
    tl.store(bias_ptr + column - WEIGHTS, total, mask=(column >= WEIGHTS) & (column < SIZE))


# no batch size compiles anew, nor what follows from it
@triton.jit(do_not_specialize=["splits_proj", "splits_fuse", "programs_h", "programs_w"])
def partial_sums_kernel(
    partial_h_ptr,  # [splits_proj, H * H + H]
    partial_w_ptr,  # [splits_proj, W * W + W]
    partial_fuse_ptr,  # [splits_fuse, C * 3C + C]
    proj_h_ptr, bias_h_ptr, proj_w_ptr, bias_w_ptr, fuse_ptr, bias_ptr,  # contiguous, any types
    splits_proj, splits_fuse,
    programs_h, programs_w,  # each 0 where that gradient is not wanted
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS_PROJ: tl.constexpr, ROWS_FUSE: tl.constexpr,  # partial results at a time
    TILE: tl.constexpr,  # elements at a time
):  # fmt: skip
    """Gradients of proj_h, proj_w and fuse and their biases, each sum in a fixed order."""
    pid = tl.program_id(0)
    if pid < programs_h:
        sum_columns(
            partial_h_ptr, proj_h_ptr, bias_h_ptr, pid, splits_proj,
            HEIGHT * HEIGHT, HEIGHT, ROWS_PROJ, TILE // ROWS_PROJ,
        )  # fmt: skip
    elif pid < programs_h + programs_w:
        sum_columns(
            partial_w_ptr, proj_w_ptr, bias_w_ptr, pid - programs_h, splits_proj,
            WIDTH * WIDTH, WIDTH, ROWS_PROJ, TILE // ROWS_PROJ,
        )  # fmt: skip
    else:
        sum_columns(
            partial_fuse_ptr, fuse_ptr, bias_ptr, pid - programs_h - programs_w, splits_fuse,
            3 * CHANNELS * CHANNELS, CHANNELS, ROWS_FUSE, TILE // ROWS_FUSE,
        )  # fmt: skip
