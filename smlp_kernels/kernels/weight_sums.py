"""The last launch of the backward: partial results become gradients, each in its weight's type."""

import math

import triton
import triton.language as tl

from smlp_kernels.launch import Plan


@triton.jit
def sum_columns(
    partial_ptr,  # [rows, WEIGHTS + BIASES]
    weight_ptr,  # [WEIGHTS]
    bias_ptr,  # [BIASES]
    block,  # of columns
    rows,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # at a time
):  # fmt: skip
    """Add up a block of columns in the order of the rows."""
    SIZE: tl.constexpr = WEIGHTS + BIASES
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < SIZE)[None, :]
        acc += tl.load(partial_ptr + row[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    tl.store(weight_ptr + column, total, mask=column < WEIGHTS)
    tl.store(bias_ptr + column - WEIGHTS, total, mask=(column >= WEIGHTS) & (column < SIZE))


# neither the batch nor which gradients are wanted compiles another kernel
@triton.jit(do_not_specialize=["rows_h", "rows_w", "parts", "programs_h", "programs_w"])
def weight_sums_kernel(
    partial_h_ptr,  # [rows_h, H * H + H]
    partial_w_ptr,  # [rows_w, W * W + W]
    total_ptr,  # [parts, C, COLUMNS]: the gradient of fuse, then that of its bias
    # or, packed, [parts, C * 3C + C]
    proj_h_ptr,  # [H, H]; these six are contiguous, of any types
    bias_h_ptr,  # [H]
    proj_w_ptr,  # [W, W]
    bias_w_ptr,  # [W]
    fuse_ptr,  # [C, 3C]
    bias_ptr,  # [C]
    rows_h, rows_w, parts,
    programs_h, programs_w,  # each 0 where not wanted
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,  # elements at a time
    PARTS: tl.constexpr,  # at a time; 0: not packed
):  # fmt: skip
    """Each sum in a fixed order: the same bits in every run."""
    pid = tl.program_id(0)
    if pid < programs_h:
        sum_columns(
            partial_h_ptr, proj_h_ptr, bias_h_ptr, pid, rows_h,
            HEIGHT * HEIGHT, HEIGHT, ROWS, TILE // ROWS,
        )  # fmt: skip
    elif pid < programs_h + programs_w:
        sum_columns(
            partial_w_ptr, proj_w_ptr, bias_w_ptr, pid - programs_h, rows_w,
            WIDTH * WIDTH, WIDTH, ROWS, TILE // ROWS,
        )  # fmt: skip
    elif PARTS > 0:
        sum_columns(
            total_ptr, fuse_ptr, bias_ptr, pid - programs_h - programs_w, parts,
            CHANNELS * 3 * CHANNELS, CHANNELS, PARTS, TILE // PARTS,
        )  # fmt: skip
    else:
        index = (pid - programs_h - programs_w) * TILE + tl.arange(0, TILE)
        row, column = index // COLUMNS, index % COLUMNS
        total = tl.zeros((TILE,), total_ptr.dtype.element_ty)
        for part in range(parts):
            offset = part * (CHANNELS * COLUMNS)
            total += tl.load(total_ptr + offset + index, mask=row < CHANNELS, other=0.0)
        inside = (row < CHANNELS) & (column < 3 * CHANNELS)
        tl.store(fuse_ptr + row * (3 * CHANNELS) + column, total, mask=inside)
        tl.store(bias_ptr + row, total, mask=(row < CHANNELS) & (column == 3 * CHANNELS))


TILE, ROWS, PARTS, NUM_WARPS = 2048, 256, 32, 8
REGISTERS = 128  # no bound that any chip reaches: without one, 10.0 is given 48, and spills


def weight_sums_plan(
    size: tuple[int, int, int],  # C, H, W
    total: tuple[int, ...],  # parts, C, columns; or parts, C * 3C + C
    rows_h: int,
    rows_w: int,
) -> Plan:
    """The plan of ``weight_sums_kernel``; rows and parts are 0 where a gradient is not wanted."""
    parts, *rest = total
    packed = len(rest) == 1
    channels, height, width = size
    block = TILE // ROWS
    programs_h = triton.cdiv(height * (height + 1), block) if rows_h else 0
    programs_w = triton.cdiv(width * (width + 1), block) if rows_w else 0
    programs = triton.cdiv(math.prod(rest), TILE // PARTS if packed else TILE) if parts else 0
    return Plan(
        weight_sums_kernel,
        programs_h + programs_w + programs,
        (rows_h, rows_w, parts, programs_h, programs_w),
        {
            "CHANNELS": channels,
            "COLUMNS": rest[-1],
            "HEIGHT": height,
            "WIDTH": width,
            "ROWS": ROWS,
            "TILE": TILE,
            "PARTS": PARTS if packed else 0,
        },
        NUM_WARPS,
        REGISTERS,
    )
