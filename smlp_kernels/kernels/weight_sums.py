"""The last launch of the backward: partial results become gradients, each in its weight's type."""

import triton
import triton.language as tl

from smlp_kernels.launch import Plan


@triton.jit
def sum_parts(
    partial_ptr,  # [parts, LINES, COLUMNS]: in each line weights, then biases, then nothing
    weight_ptr,  # [LINES, WEIGHTS]
    bias_ptr,  # [LINES, BIASES]
    block,  # of what is summed
    parts,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,  # at a time
):  # fmt: skip
    """Add up a block of the gradients of a weight and its bias, in the order of the parts."""
    SIZE: tl.constexpr = LINES * COLUMNS
    index = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((PARTS, BLOCK), partial_ptr.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (index < SIZE)[None, :]
        acc += tl.load(partial_ptr + part[:, None] * SIZE + index[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    line, column = index // COLUMNS, index % COLUMNS
    bias = column - WEIGHTS
    tl.store(weight_ptr + line * WEIGHTS + column, total, mask=(index < SIZE) & (bias < 0))
    is_bias = (index < SIZE) & (bias >= 0) & (bias < BIASES)
    tl.store(bias_ptr + line * BIASES + bias, total, mask=is_bias)


# neither the batch nor which gradients are wanted compiles another kernel
@triton.jit(do_not_specialize=["rows_h", "rows_w", "parts", "programs_h", "programs_w"])
def weight_sums_kernel(
    partial_h_ptr,  # [rows_h, H * H + H]
    partial_w_ptr,  # [rows_w, W * W + W]
    total_ptr,  # [parts, C, COLUMNS]
    proj_h_ptr,  # [H, H]; these six are contiguous, of any types
    bias_h_ptr,  # [H]
    proj_w_ptr,  # [W, W]
    bias_w_ptr,  # [W]
    fuse_ptr,  # [C, 3C]
    bias_ptr,  # [C]
    rows_h, rows_w, parts,
    programs_h, programs_w,  # each 0 where not wanted
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,  # elements, and parts of them
):  # fmt: skip
    """Each sum in a fixed order: the same bits in every run."""
    pid = tl.program_id(0)
    if pid < programs_h:
        sum_parts(
            partial_h_ptr, proj_h_ptr, bias_h_ptr, pid, rows_h,
            1, HEIGHT * HEIGHT + HEIGHT, HEIGHT * HEIGHT, HEIGHT, ROWS, TILE // ROWS,
        )  # fmt: skip
    elif pid < programs_h + programs_w:
        sum_parts(
            partial_w_ptr, proj_w_ptr, bias_w_ptr, pid - programs_h, rows_w,
            1, WIDTH * WIDTH + WIDTH, WIDTH * WIDTH, WIDTH, ROWS, TILE // ROWS,
        )  # fmt: skip
    else:
        sum_parts(
            total_ptr, fuse_ptr, bias_ptr, pid - programs_h - programs_w, parts,
            CHANNELS, COLUMNS, 3 * CHANNELS, 1, PARTS, TILE // PARTS,
        )  # fmt: skip


TILE, ROWS, NUM_WARPS = 2048, 256, 8
REGISTERS = 128  # more than any chip needs; without a bound, 10.0 is given 48, and spills


def weight_sums_plan(
    size: tuple[int, int, int],  # C, H, W
    rows: tuple[int, int],  # along H, along W
    total: tuple[int, int, int],  # shape; with the rows, 0 where a gradient is not wanted
    parts_at_a_time: int,
) -> Plan:
    """The plan of ``weight_sums_kernel``; how many parts are added at a time decides the order."""
    channels, height, width = size
    parts, _, columns = total
    programs_h, programs_w, programs = (
        triton.cdiv(elements, TILE // at_a_time) if count else 0
        for count, elements, at_a_time in (
            (rows[0], height * (height + 1), ROWS),
            (rows[1], width * (width + 1), ROWS),
            (parts, channels * columns, parts_at_a_time),
        )
    )
    return Plan(
        weight_sums_kernel,
        programs_h + programs_w + programs,
        (*rows, parts, programs_h, programs_w),
        {
            "CHANNELS": channels,
            "COLUMNS": columns,
            "HEIGHT": height,
            "WIDTH": width,
            "TILE": TILE,
            "ROWS": ROWS,
            "PARTS": parts_at_a_time,
        },
        NUM_WARPS,
        REGISTERS,
    )
