"""The weight-gradient kernels: everything the parameters need, from one read of x and dy each.

Both work on *lines*: a line is all positions along the mixed axis at one place of the other axis
of one image. A tile is LINES lines of POSITIONS positions (a power of two, at most 64); longer axes
are cut into several blocks of positions. Programs own a fixed share of the lines and leave one
partial result each, which partial_sums.py adds up in a fixed order: deterministic, no atomics.
"""

import triton
import triton.language as tl

from smlp_kernels.kernels.mix import (
    lines_to_rows,
    load_matrix,
    mix_lines,
    split_line_index,
)


@triton.jit
def line_offsets(
    tile, start, n_lines, others, size, stride_b, stride_other, stride_position,
    LINES: tl.constexpr, POSITIONS: tl.constexpr, INDEX_64: tl.constexpr,
):  # fmt: skip
    """Offsets [LINES * POSITIONS] and mask of a tile; line = (image, place on the other axis)."""
    index = tl.arange(0, LINES * POSITIONS)
    line = tile * LINES + index // POSITIONS
    position = start + index % POSITIONS
    image = (line // others).to(tl.int64)  # an image's offset may need 64 bits at any size
    other = line % others
    if INDEX_64:
        other, position = other.to(tl.int64), position.to(tl.int64)
    offsets = image * stride_b + (other * stride_other + position * stride_position)
    return offsets, (line < n_lines) & (position < size)


@triton.jit
def load_tile(ptr, offsets, offsets_mask, channel, channels, stride_c, INDEX_64: tl.constexpr):
    """[LINES * POSITIONS, channels of the block]."""
    if INDEX_64:
        channel = channel.to(tl.int64)
    mask = offsets_mask[:, None] & (channel < channels)[None, :]
    return tl.load(ptr + (offsets[:, None] + channel[None, :] * stride_c), mask=mask, other=0.0)


@triton.jit
def store_matrix(ptr, rows, cols, size, stride_row, values):
    """Write a tile of a matrix with contiguous rows, as far as it is inside [size, size]."""
    offsets = rows[:, None] * stride_row + cols[None, :]
    tl.store(ptr + offsets, values, mask=(rows < size)[:, None] & (cols < size)[None, :])


@triton.jit
def proj_grad_axis(
    dy_ptr, x_ptr, fuse_ptr, partial_ptr, split, splits, block, batch, others, size,
    stride_db, stride_dc, stride_do, stride_dp,  # of dy: image, channel, other axis, position
    stride_xb, stride_xc, stride_xo, stride_xp,
    stride_f_out, stride_f_in,
    CHANNELS: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One axis' partial sums: dproj[i, k] = sum <F' dy at i, x at k>, dbias[i] = sum F' dy at i."""
    dtype = x_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ROWS: tl.constexpr = LINES * POSITIONS
    blocks = tl.cdiv(size, POSITIONS)
    start_i = (block // blocks) * POSITIONS
    start_k = (block % blocks) * POSITIONS
    n_lines = batch * others

    gram = tl.zeros((ROWS, ROWS), ACC)
    bias = tl.zeros((ROWS,), ACC)
    for tile in range(split, tl.cdiv(n_lines, LINES), splits):
        dy_offsets, dy_mask = line_offsets(
            tile, start_i, n_lines, others, size, stride_db, stride_do, stride_dp,
            LINES, POSITIONS, INDEX_64,
        )  # fmt: skip
        x_offsets, x_mask = line_offsets(
            tile, start_k, n_lines, others, size, stride_xb, stride_xo, stride_xp,
            LINES, POSITIONS, INDEX_64,
        )  # fmt: skip
        for start_c in range(0, CHANNELS, BLOCK_C):
            c = start_c + tl.arange(0, BLOCK_C)
            mixed = tl.zeros((ROWS, BLOCK_C), ACC)  # F' dy
            for start_o in range(0, CHANNELS, BLOCK_O):
                o = start_o + tl.arange(0, BLOCK_O)
                dy = load_tile(dy_ptr, dy_offsets, dy_mask, o, CHANNELS, stride_dc, INDEX_64)
                fuse = load_matrix(fuse_ptr, o, c, CHANNELS, CHANNELS, stride_f_out, stride_f_in)
                mixed = tl.dot(dy, fuse, mixed, out_dtype=ACC, input_precision=PRECISION)
            x = load_tile(x_ptr, x_offsets, x_mask, c, CHANNELS, stride_xc, INDEX_64)
            bias += tl.sum(mixed, 1)
            gram = tl.dot(
                mixed.to(dtype), tl.trans(x), gram, out_dtype=ACC, input_precision=PRECISION
            )

    # only products within one line count; `where`, not a product with 0, so that NaN stays out
    row = tl.arange(0, ROWS)
    same_line = row[:, None] // POSITIONS == row[None, :] // POSITIONS
    gram = tl.where(same_line, gram, 0.0).reshape(LINES, POSITIONS, LINES, POSITIONS)
    gram = tl.sum(tl.sum(gram, 2), 0)
    bias = tl.sum(bias.reshape(LINES, POSITIONS), 0)
    i = start_i + tl.arange(0, POSITIONS)
    k = start_k + tl.arange(0, POSITIONS)
    partial_ptr += split.to(tl.int64) * (size * (size + 1))
    store_matrix(partial_ptr, i, k, size, size, gram)
    if start_k == 0:
        tl.store(partial_ptr + size * size + i, bias, mask=i < size)


# no batch size compiles anew, nor what follows from it
@triton.jit(do_not_specialize=["splits", "programs_h", "batch"])
def proj_grad_kernel(
    dy_ptr,  # [B, C, H, W], any strides
    x_ptr,  # [B, C, H, W], any strides
    fuse_ptr,  # [3, C, C] branch (h, w, identity), out, in
    partial_h_ptr,  # [splits, H * H + H]
    partial_w_ptr,  # [splits, W * W + W]
    splits,
    programs_h,  # programs on the h axis; 0 where its gradient is not wanted
    batch,
    stride_db, stride_dc, stride_dh, stride_dw,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_f_branch, stride_f_out, stride_f_in,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    LINES: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_O: tl.constexpr,  # channels of dy a step
    BLOCK_C: tl.constexpr,  # channels of x a step
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients of proj_h and proj_w, weights then bias, flattened."""
    pid = tl.program_id(0)
    # The axes differ in scalars alone. Two copies of the body, one an axis, would make the compiler
    # run the matrix instructions of either one after another for want of registers.
    along_h = pid < programs_h
    pid = tl.where(along_h, pid, pid - programs_h)
    partial_ptr = partial_h_ptr if along_h else partial_w_ptr
    proj_grad_axis(
        dy_ptr, x_ptr, fuse_ptr + tl.where(along_h, 0, stride_f_branch), partial_ptr,
        pid % splits, splits, pid // splits, batch,
        tl.where(along_h, WIDTH, HEIGHT), tl.where(along_h, HEIGHT, WIDTH),
        stride_db, stride_dc,
        tl.where(along_h, stride_dw, stride_dh), tl.where(along_h, stride_dh, stride_dw),
        stride_xb, stride_xc,
        tl.where(along_h, stride_xw, stride_xh), tl.where(along_h, stride_xh, stride_xw),
        stride_f_out, stride_f_in,
        CHANNELS, LINES, POSITIONS, BLOCK_O, BLOCK_C, INDEX_64, PRECISION,
    )  # fmt: skip


@triton.jit
def branch_tile(
    x_ptr, proj_ptr, proj_bias_ptr, tile, start_i, first_c, n_lines, others, size,
    stride_b, stride_c, stride_other, stride_position, stride_out, stride_in,
    CHANNELS: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr, MIXES: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """proj x + bias, or x: [LINES * POSITIONS, BLOCK_C] in the type of x."""
    if MIXES:
        line, c = split_line_index(tl.arange(0, LINES * BLOCK_C), LINES, BLOCK_C, CHANNELS_LAST)
        line += tile * LINES
        c += first_c
        mask = (line < n_lines) & (c < CHANNELS)
        other = line % others
        if INDEX_64:
            other, c = other.to(tl.int64), c.to(tl.int64)
        offsets = (line // others).to(tl.int64) * stride_b + (other * stride_other + c * stride_c)
        BLOCK_K: tl.constexpr = max(POSITIONS, 16)  # the least that a product can sum over
        mixed = mix_lines(
            x_ptr, offsets, mask, stride_position, proj_ptr, stride_out, stride_in, proj_bias_ptr,
            start_i + tl.arange(0, POSITIONS), size, BLOCKS * POSITIONS, BLOCK_K,
            HAS_BIAS, INDEX_64, ACC, PRECISION,
        )  # fmt: skip
        mixed = mixed.to(x_ptr.dtype.element_ty)
        return lines_to_rows(mixed, LINES, BLOCK_C, CHANNELS_LAST)
    else:
        offsets, mask = line_offsets(
            tile, start_i, n_lines, others, size, stride_b, stride_other, stride_position,
            LINES, POSITIONS, INDEX_64,
        )  # fmt: skip
        c = first_c + tl.arange(0, BLOCK_C)
        return load_tile(x_ptr, offsets, mask, c, CHANNELS, stride_c, INDEX_64)


@triton.jit
def fuse_grad_axis(
    dy_ptr, x_ptr, proj_ptr, proj_bias_ptr, partial_ptr, bias_partial_ptr,
    leave_bias,  # whether this program leaves the sum of dy, too
    split, splits, first_o, first_c, batch, others, size,
    stride_db, stride_dc, stride_do, stride_dp,
    stride_xb, stride_xc, stride_xo, stride_xp,
    stride_p_out, stride_p_in,
    CHANNELS: tl.constexpr, LINES: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of positions that hold the longer axis
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, REST_C: tl.constexpr,
    MIXES: tl.constexpr,  # False for the identity branch
    HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A branch' partial sum of dF[o, c] = sum dy[o] (proj x + bias)[c], and that of dy."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    o = first_o + tl.arange(0, BLOCK_O)
    n_lines = batch * others

    acc = tl.zeros((BLOCK_O, BLOCK_C), ACC)
    rest = tl.zeros((BLOCK_O, max(REST_C, 1)), ACC)
    dy_sum = tl.zeros((BLOCK_O,), ACC)
    for index in range(split, tl.cdiv(n_lines, LINES) * BLOCKS, splits):
        tile = index // BLOCKS
        start_i = (index % BLOCKS) * POSITIONS
        dy_offsets, dy_mask = line_offsets(
            tile, start_i, n_lines, others, size, stride_db, stride_do, stride_dp,
            LINES, POSITIONS, INDEX_64,
        )  # fmt: skip
        dy = load_tile(dy_ptr, dy_offsets, dy_mask, o, CHANNELS, stride_dc, INDEX_64)
        if MIXES:
            # in the loop of the axes: beside the products of the identity's loop it would make them
            # wait for each other (Triton 3.9)
            dy_sum += tl.sum(dy.to(ACC), 0)
        branch = branch_tile(
            x_ptr, proj_ptr, proj_bias_ptr, tile, start_i, first_c, n_lines, others, size,
            stride_xb, stride_xc, stride_xo, stride_xp, stride_p_out, stride_p_in,
            CHANNELS, LINES, POSITIONS, BLOCKS, BLOCK_C, MIXES, HAS_BIAS,
            CHANNELS_LAST, INDEX_64, ACC, PRECISION,
        )  # fmt: skip
        acc = tl.dot(tl.trans(dy), branch, acc, out_dtype=ACC, input_precision=PRECISION)
        if REST_C:
            branch = branch_tile(
                x_ptr, proj_ptr, proj_bias_ptr, tile, start_i, first_c + BLOCK_C, n_lines, others,
                size, stride_xb, stride_xc, stride_xo, stride_xp, stride_p_out, stride_p_in,
                CHANNELS, LINES, POSITIONS, BLOCKS, REST_C, MIXES, HAS_BIAS,
                CHANNELS_LAST, INDEX_64, ACC, PRECISION,
            )  # fmt: skip
            rest = tl.dot(tl.trans(dy), branch, rest, out_dtype=ACC, input_precision=PRECISION)

    store_matrix(partial_ptr, o, first_c + tl.arange(0, BLOCK_C), CHANNELS, 3 * CHANNELS, acc)
    if REST_C:
        rest_c = first_c + BLOCK_C + tl.arange(0, REST_C)
        store_matrix(partial_ptr, o, rest_c, CHANNELS, 3 * CHANNELS, rest)
    if MIXES and leave_bias:
        tl.store(bias_partial_ptr + o, dy_sum, mask=o < CHANNELS)


@triton.jit(do_not_specialize=["splits", "batch"])
def fuse_grad_kernel(
    dy_ptr,  # [B, C, H, W], any strides
    x_ptr,  # [B, C, H, W], any strides
    proj_h_ptr,  # [H, H] out, in
    bias_h_ptr,  # [H]
    proj_w_ptr,  # [W, W] out, in
    bias_w_ptr,  # [W]
    partial_ptr,  # [splits, C * 3C + C]
    splits,
    batch,
    stride_db, stride_dc, stride_dh, stride_dw,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_h_out, stride_h_in, stride_w_out, stride_w_in,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    LINES: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK_O: tl.constexpr,  # output channels of a tile of dF
    BLOCK_C: tl.constexpr,  # input channels of a tile of dF: a power of two, and another or 0
    REST_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # both biases, of one type, or neither
    CHANNELS_LAST: tl.constexpr,  # stride_xc == 1: decides only the order of loads
    INDEX_64: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients of fuse, weight [C, 3C] then bias [C], flattened."""
    TILES_O: tl.constexpr = (CHANNELS + BLOCK_O - 1) // BLOCK_O
    TILE_C: tl.constexpr = BLOCK_C + REST_C
    TILES_C: tl.constexpr = (CHANNELS + TILE_C - 1) // TILE_C
    pid = tl.program_id(0)
    first_o = (pid % TILES_O) * BLOCK_O
    pid = pid // TILES_O
    first_c = (pid % TILES_C) * TILE_C
    pid = pid // TILES_C
    split = pid % splits
    branch = pid // splits
    partial_ptr += split.to(tl.int64) * (CHANNELS * (3 * CHANNELS + 1))
    bias_partial_ptr = partial_ptr + CHANNELS * 3 * CHANNELS
    partial_ptr += branch * CHANNELS
    # as above: the axes differ in scalars alone
    along_h = branch == 0
    others, size = tl.where(along_h, WIDTH, HEIGHT), tl.where(along_h, HEIGHT, WIDTH)
    stride_do = tl.where(along_h, stride_dw, stride_dh)
    stride_dp = tl.where(along_h, stride_dh, stride_dw)
    stride_xo = tl.where(along_h, stride_xw, stride_xh)
    stride_xp = tl.where(along_h, stride_xh, stride_xw)
    proj_ptr = proj_h_ptr if along_h else proj_w_ptr
    bias_ptr = (bias_h_ptr if along_h else bias_w_ptr) if HAS_BIAS else proj_ptr  # or not read
    BLOCKS: tl.constexpr = (max(HEIGHT, WIDTH) + POSITIONS - 1) // POSITIONS
    leave_bias = along_h & (first_c == 0)
    if branch < 2:
        fuse_grad_axis(
            dy_ptr, x_ptr, proj_ptr, bias_ptr, partial_ptr, bias_partial_ptr, leave_bias,
            split, splits, first_o, first_c, batch, others, size,
            stride_db, stride_dc, stride_do, stride_dp,
            stride_xb, stride_xc, stride_xo, stride_xp,
            tl.where(along_h, stride_h_out, stride_w_out),
            tl.where(along_h, stride_h_in, stride_w_in),
            CHANNELS, LINES, POSITIONS, BLOCKS, BLOCK_O, BLOCK_C, REST_C, True, HAS_BIAS,
            CHANNELS_LAST, INDEX_64, PRECISION,
        )  # fmt: skip
    else:
        fuse_grad_axis(
            dy_ptr, x_ptr, proj_ptr, bias_ptr, partial_ptr, bias_partial_ptr, leave_bias,
            split, splits, first_o, first_c, batch, others, size,
            stride_db, stride_dc, stride_do, stride_dp,
            stride_xb, stride_xc, stride_xo, stride_xp,
            0, 0,
            CHANNELS, LINES, POSITIONS, BLOCKS, BLOCK_O, BLOCK_C, REST_C, False, False,
            CHANNELS_LAST, INDEX_64, PRECISION,
        )  # fmt: skip
