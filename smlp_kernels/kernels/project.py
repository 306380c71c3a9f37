"""The projection along H into memory, for images with a long axis.

There the columns that cross a tile of ``mix_kernel`` are many times the tile: projecting them once
moves less than reading them again for every tile, although the result takes a way through memory.
"""

import triton
import triton.language as tl

from smlp_kernels.kernels.mix import mix_lines, split_line_index


@triton.jit
def project_h_kernel(
    x_ptr,  # [B, C, H, W], any strides
    proj_ptr,  # [H, H] out, in
    bias_ptr,  # [H]
    y_ptr,  # [B, C, H, W], any strides
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_out,
    stride_in,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,  # output rows of a tile
    BLOCK_LINES: tl.constexpr,  # columns of a tile, one for every place on W and channel
    BLOCK_K: tl.constexpr,  # input rows a step
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # stride_xc == 1: decides only the order of columns
    INDEX_64: tl.constexpr,  # offsets inside an image exceed 31 bits
    PRECISION: tl.constexpr,
):
    """y[b, c, h, w] = sum_k proj[h, k] x[b, c, k, w] + bias[h], rounded to the type of x."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    LINES: tl.constexpr = CHANNELS * WIDTH
    TILES_H: tl.constexpr = (HEIGHT + BLOCK_H - 1) // BLOCK_H
    TILES_LINES: tl.constexpr = (LINES + BLOCK_LINES - 1) // BLOCK_LINES

    pid = tl.program_id(0)  # those that read the same columns run next to each other
    h = (pid % TILES_H) * BLOCK_H + tl.arange(0, BLOCK_H)
    pid = pid // TILES_H
    line = (pid % TILES_LINES) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    image = (pid // TILES_LINES).to(tl.int64)
    x_ptr += image * stride_xb
    y_ptr += image * stride_yb

    w, c = split_line_index(line, WIDTH, CHANNELS, CHANNELS_LAST)
    line_mask = line < LINES
    y_h = h
    if INDEX_64:
        w, c, y_h = w.to(tl.int64), c.to(tl.int64), h.to(tl.int64)
    acc = mix_lines(
        x_ptr,
        w * stride_xw + c * stride_xc,
        line_mask,
        stride_xh,
        proj_ptr,
        stride_out,
        stride_in,
        bias_ptr,
        h,
        HEIGHT,
        HEIGHT,
        BLOCK_K,
        HAS_BIAS,
        INDEX_64,
        ACC,
        PRECISION,
    )  # [BLOCK_H, BLOCK_LINES]
    y_offsets = y_h[:, None] * stride_yh + (w * stride_yw + c * stride_yc)[None, :]
    tl.store(
        y_ptr + y_offsets,
        acc.to(x_ptr.dtype.element_ty),
        mask=(h < HEIGHT)[:, None] & line_mask[None, :],
    )
