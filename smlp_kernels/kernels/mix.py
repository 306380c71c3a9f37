"""The forward kernel: both axis projections, the concat and the 1x1 fusion in one launch.

A program owns a tile of pixels (some images x TILE_H x TILE_W) and BLOCK_N output channels. It
walks the input channels in blocks: the whole columns and whole rows that cross its tile are mixed
by two small products, and the mixed tiles go straight into the channel product as its left operand.
Nothing but the output is ever written, and no program waits for another. Rows and columns are read
again by neighbouring tiles, which is L2 traffic, not DRAM traffic: tiles of one image run next to
each other. A tile that holds whole images is read once and mixed from where it lies; of images with
a long axis, the projection along H comes from a launch before (:mod:`smlp_kernels.kernels.project`)
and the tiles are wide.
"""

import triton
import triton.language as tl


@triton.jit
def load_matrix(ptr, rows, cols, n_rows, n_cols, stride_row, stride_col):
    """Tile of a matrix, zero outside [n_rows, n_cols]; rows [R], cols [C] -> [R, C]."""
    offsets = rows[:, None] * stride_row + cols[None, :] * stride_col
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def mix_lines(
    x_ptr,  # at the tile's first image and first input channel of the block
    line_offsets,  # [LINES * BLOCK_C] offset of position 0 of every (line, channel)
    line_mask,  # [LINES * BLOCK_C]
    stride_position,  # of x along the mixed axis
    proj_ptr,  # [size, size] out, in
    stride_out,
    stride_in,
    bias_ptr,  # [size]
    outputs,  # [TILE] output positions on the axis
    size,  # of the axis
    END: tl.constexpr,  # of the loop over positions: size, or more
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEX_64: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """proj[outputs, :] @ x[:, lines] + bias[outputs]: [TILE, LINES * BLOCK_C] in ACC."""
    acc = tl.zeros((outputs.shape[0], line_offsets.shape[0]), ACC)
    # one step is no loop of the compiled code, and leaves that around it to be pipelined
    for start in range(0, END, BLOCK_K):
        position = start + tl.arange(0, BLOCK_K)
        proj = load_matrix(proj_ptr, outputs, position, size, size, stride_out, stride_in)
        if INDEX_64:
            offsets = position.to(tl.int64)[:, None] * stride_position + line_offsets[None, :]
        else:
            offsets = position[:, None] * stride_position + line_offsets[None, :]
        mask = (position < size)[:, None] & line_mask[None, :]
        lines = tl.load(x_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_K, LINES * BLOCK_C]
        acc = tl.dot(proj, lines, acc, out_dtype=ACC, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=outputs < size, other=0.0).to(ACC)[:, None]
    return acc


@triton.jit
def mix_whole_lines(
    lines,  # [TILE, LINES * BLOCK_C], zero beyond SIZE
    proj_ptr,  # [SIZE, SIZE] out, in
    stride_out,
    stride_in,
    bias_ptr,  # [SIZE]
    positions,  # [TILE], on the axis
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """proj @ lines + bias, of lines that were read already: [TILE, LINES * BLOCK_C] in ACC."""
    proj = load_matrix(proj_ptr, positions, positions, SIZE, SIZE, stride_out, stride_in)
    acc = tl.dot(proj, lines, out_dtype=ACC, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + positions, mask=positions < SIZE, other=0.0).to(ACC)[:, None]
    return acc


@triton.jit
def split_line_index(
    index, LINES: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """(line, channel) of a flat index; the axis that is contiguous in memory runs fastest."""
    if CHANNELS_LAST:
        return index // BLOCK_C, index % BLOCK_C
    return index % LINES, index // LINES


@triton.jit
def lines_to_rows(mixed, LINES: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """[POSITIONS, LINES * BLOCK_C] of split_line_index to [LINES * POSITIONS, BLOCK_C]."""
    POSITIONS: tl.constexpr = mixed.shape[0]
    if CHANNELS_LAST:
        mixed = mixed.reshape(POSITIONS, LINES, BLOCK_C).permute(1, 0, 2)
    else:
        mixed = mixed.reshape(POSITIONS, BLOCK_C, LINES).permute(2, 0, 1)
    return mixed.reshape(LINES * POSITIONS, BLOCK_C)


@triton.jit
def fuse_branch(
    x,  # [PIXELS, BLOCK_C]
    fuse_ptr,  # of the branch: [C, C] out, in
    c,  # [BLOCK_C] input channels
    n,  # [BLOCK_N] output channels
    rest_n,  # [REST_N]
    acc,  # [PIXELS, BLOCK_N]
    rest,  # [PIXELS, REST_N]
    stride_out,
    stride_in,
    CHANNELS: tl.constexpr,
    HAS_REST: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums of both blocks of output channels with this branch' part in them."""
    fuse = load_matrix(fuse_ptr, c, n, CHANNELS, CHANNELS, stride_in, stride_out)
    acc = tl.dot(x, fuse, acc, out_dtype=ACC, input_precision=PRECISION)
    if HAS_REST:
        fuse = load_matrix(fuse_ptr, c, rest_n, CHANNELS, CHANNELS, stride_in, stride_out)
        rest = tl.dot(x, fuse, rest, out_dtype=ACC, input_precision=PRECISION)
    return acc, rest


@triton.jit
def store_channels(
    y_ptr,
    y_offsets,  # [PIXELS] of channel 0
    stride_c,
    pixel_mask,
    n,  # [BLOCK_N] channels
    acc,  # [PIXELS, BLOCK_N]
    bias_ptr,
    bias_offsets,  # [PIXELS] of channel 0, with BIAS_MAP
    stride_bias_c,
    CHANNELS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_MAP: tl.constexpr,
    INDEX_64: tl.constexpr,
):
    """Add the bias and write a block of output channels."""
    mask = pixel_mask[:, None] & (n < CHANNELS)[None, :]
    if HAS_BIAS:
        if BIAS_MAP:
            offsets = bias_offsets[:, None] + n[None, :] * stride_bias_c
            acc += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(acc.dtype)
        else:
            bias = tl.load(bias_ptr + n * stride_bias_c, mask=n < CHANNELS, other=0.0)
            acc += bias.to(acc.dtype)[None, :]
    if INDEX_64:
        n = n.to(tl.int64)
    offsets = y_offsets[:, None] + n[None, :] * stride_c
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])  # no batch size compiles anew
def mix_kernel(
    x_ptr,  # [B, C, H, W], any strides
    x_h_ptr,  # [B, C, H, W], strides of y: P_h x + b_h; with PROJECTED, else not read
    proj_h_ptr,  # [H, H] out, in
    bias_h_ptr,  # [H]
    proj_w_ptr,  # [W, W] out, in
    bias_w_ptr,  # [W]
    fuse_ptr,  # [3, C, C] branch (h, w, identity), out, in
    bias_ptr,  # [C], or [C, H, W] with BIAS_MAP
    y_ptr,  # [B, C, H, W], any strides
    batch,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_h_out,
    stride_h_in,
    stride_w_out,
    stride_w_in,
    stride_f_branch,
    stride_f_out,
    stride_f_in,
    stride_bias_c,
    stride_bias_h,
    stride_bias_w,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IMAGES: tl.constexpr,  # images of a tile
    TILE_H: tl.constexpr,  # rows of a tile, a power of two; STEP_H of them are used
    TILE_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    BLOCK_C: tl.constexpr,  # input channels a step
    BLOCK_N: tl.constexpr,  # output channels of a tile: a power of two, and another or 0
    REST_N: tl.constexpr,
    BLOCK_H: tl.constexpr,  # rows of a column taken by one mixing product
    BLOCK_W: tl.constexpr,
    WHOLE: tl.constexpr,  # one tile holds all of an image, and is read once
    PROJECTED: tl.constexpr,  # the projection along H was computed before
    HAS_BIAS_H: tl.constexpr,
    HAS_BIAS_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_MAP: tl.constexpr,  # a bias for every place instead of one for every channel
    CHANNELS_LAST: tl.constexpr,  # stride_xc == 1: decides only the order of loads
    INDEX_64: tl.constexpr,  # offsets inside a tile exceed 31 bits
    PRECISION: tl.constexpr,
):
    """y[b, n, h, w] = sum_c F_h (P_h x + b_h) + F_w (x P_w' + b_w) + F_i x + bias[n]."""
    dtype = x_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    PIXELS: tl.constexpr = IMAGES * TILE_H * TILE_W
    TILES_H: tl.constexpr = (HEIGHT + STEP_H - 1) // STEP_H
    TILES_W: tl.constexpr = (WIDTH + STEP_W - 1) // STEP_W
    TILE_N: tl.constexpr = BLOCK_N + REST_N
    TILES_N: tl.constexpr = (CHANNELS + TILE_N - 1) // TILE_N

    pid = tl.program_id(0)
    first_n = (pid % TILES_N) * TILE_N
    pid = pid // TILES_N
    first_w = (pid % TILES_W) * STEP_W
    pid = pid // TILES_W
    first_h = (pid % TILES_H) * STEP_H
    first_image = (pid // TILES_H) * IMAGES

    # a 64-bit base; offsets inside the tile are small unless INDEX_64 says otherwise
    x_ptr += first_image.to(tl.int64) * stride_xb
    y_ptr += first_image.to(tl.int64) * stride_yb
    if PROJECTED:
        x_h_ptr += first_image.to(tl.int64) * stride_yb
    images_left = batch - first_image
    end_h = min(HEIGHT, first_h + STEP_H)
    end_w = min(WIDTH, first_w + STEP_W)

    pixel = tl.arange(0, PIXELS)  # image, row, column
    b = pixel // (TILE_H * TILE_W)
    h = first_h + pixel // TILE_W % TILE_H
    w = first_w + pixel % TILE_W
    pixel_mask = (b < images_left) & (h < end_h) & (w < end_w)
    tile_h = first_h + tl.arange(0, TILE_H)
    tile_w = first_w + tl.arange(0, TILE_W)

    # columns through the tile: lines (image, w), mixed along h; rows: lines (image, h), along w
    column, column_c = split_line_index(
        tl.arange(0, IMAGES * TILE_W * BLOCK_C), IMAGES * TILE_W, BLOCK_C, CHANNELS_LAST
    )
    column_b = column // TILE_W
    column_w = first_w + column % TILE_W
    column_mask = (column_b < images_left) & (column_w < end_w)
    row, row_c = split_line_index(
        tl.arange(0, IMAGES * TILE_H * BLOCK_C), IMAGES * TILE_H, BLOCK_C, CHANNELS_LAST
    )
    row_b = row // TILE_H
    row_h = first_h + row % TILE_H
    row_mask = (row_b < images_left) & (row_h < end_h)
    c = tl.arange(0, BLOCK_C)
    if INDEX_64:
        b, h, w, c = b.to(tl.int64), h.to(tl.int64), w.to(tl.int64), c.to(tl.int64)
        column_b, column_w = column_b.to(tl.int64), column_w.to(tl.int64)
        row_b, row_h = row_b.to(tl.int64), row_h.to(tl.int64)
        column_c, row_c = column_c.to(tl.int64), row_c.to(tl.int64)
    pixel_offsets = b * stride_xb + h * stride_xh + w * stride_xw
    column_offsets = column_b * stride_xb + column_w * stride_xw
    row_offsets = row_b * stride_xb + row_h * stride_xh
    y_offsets = b * stride_yb + h * stride_yh + w * stride_yw

    n = first_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((PIXELS, BLOCK_N), ACC)
    rest_n = first_n + BLOCK_N + tl.arange(0, max(REST_N, 1))
    rest = tl.zeros((PIXELS, max(REST_N, 1)), ACC)
    for start in range(0, CHANNELS, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        x = tl.load(
            x_ptr + (pixel_offsets[:, None] + (start + c)[None, :] * stride_xc),
            mask=pixel_mask[:, None] & (k < CHANNELS)[None, :],
            other=0.0,
        )
        # The identity comes first. Its product reads x from shared memory and stays pending until
        # the next product is waited for; as the last of a step it would still be reading when the
        # copy of a later step is issued, into the same buffer: Triton's pipeliner counts no buffer
        # for a pending wgmma whose operand something else reads, too (triton-lang/triton#6691).
        acc, rest = fuse_branch(
            x, fuse_ptr + 2 * stride_f_branch, k, n, rest_n, acc, rest,
            stride_f_out, stride_f_in, CHANNELS, REST_N > 0, ACC, PRECISION,
        )  # fmt: skip
        # Each branch is mixed, brought to the order of pixels (image, row, column) and fused before
        # the next: the mixed tile of one at a time is in registers beside the sums.
        if PROJECTED:
            x_h = tl.load(
                x_h_ptr + (y_offsets[:, None] + (start + c)[None, :] * stride_yc),
                mask=pixel_mask[:, None] & (k < CHANNELS)[None, :],
                other=0.0,
            )
        else:
            if WHOLE:
                columns = x.reshape(IMAGES, TILE_H, TILE_W * BLOCK_C).permute(1, 0, 2)
                x_h = mix_whole_lines(
                    columns.reshape(TILE_H, IMAGES * TILE_W * BLOCK_C),
                    proj_h_ptr,
                    stride_h_out,
                    stride_h_in,
                    bias_h_ptr,
                    tile_h,
                    HEIGHT,
                    HAS_BIAS_H,
                    ACC,
                    PRECISION,
                )
            else:
                x_h = mix_lines(
                    x_ptr,
                    column_offsets + (start + column_c) * stride_xc,
                    column_mask & (start + column_c < CHANNELS),
                    stride_xh,
                    proj_h_ptr,
                    stride_h_out,
                    stride_h_in,
                    bias_h_ptr,
                    tile_h,
                    HEIGHT,
                    HEIGHT,
                    BLOCK_H,
                    HAS_BIAS_H,
                    INDEX_64,
                    ACC,
                    PRECISION,
                )
            x_h = x_h.to(dtype)  # [TILE_H, columns]
            if WHOLE or CHANNELS_LAST:
                x_h = x_h.reshape(TILE_H, IMAGES, TILE_W * BLOCK_C).permute(1, 0, 2)
            else:
                x_h = x_h.reshape(TILE_H, BLOCK_C, IMAGES, TILE_W).permute(2, 0, 3, 1)
            x_h = x_h.reshape(PIXELS, BLOCK_C)
        acc, rest = fuse_branch(
            x_h, fuse_ptr, k, n, rest_n, acc, rest,
            stride_f_out, stride_f_in, CHANNELS, REST_N > 0, ACC, PRECISION,
        )  # fmt: skip
        if WHOLE:
            rows = x.reshape(IMAGES * TILE_H, TILE_W, BLOCK_C).permute(1, 0, 2)
            x_w = mix_whole_lines(
                rows.reshape(TILE_W, IMAGES * TILE_H * BLOCK_C),
                proj_w_ptr,
                stride_w_out,
                stride_w_in,
                bias_w_ptr,
                tile_w,
                WIDTH,
                HAS_BIAS_W,
                ACC,
                PRECISION,
            )
        else:
            x_w = mix_lines(
                x_ptr,
                row_offsets + (start + row_c) * stride_xc,
                row_mask & (start + row_c < CHANNELS),
                stride_xw,
                proj_w_ptr,
                stride_w_out,
                stride_w_in,
                bias_w_ptr,
                tile_w,
                WIDTH,
                WIDTH,
                BLOCK_W,
                HAS_BIAS_W,
                INDEX_64,
                ACC,
                PRECISION,
            )
        x_w = lines_to_rows(x_w.to(dtype), IMAGES * TILE_H, BLOCK_C, WHOLE or CHANNELS_LAST)
        acc, rest = fuse_branch(
            x_w, fuse_ptr + stride_f_branch, k, n, rest_n, acc, rest,
            stride_f_out, stride_f_in, CHANNELS, REST_N > 0, ACC, PRECISION,
        )  # fmt: skip

    bias_offsets = h * stride_bias_h + w * stride_bias_w
    store_channels(
        y_ptr, y_offsets, stride_yc, pixel_mask, n, acc, bias_ptr, bias_offsets, stride_bias_c,
        CHANNELS, HAS_BIAS, BIAS_MAP, INDEX_64,
    )  # fmt: skip
    if REST_N:
        store_channels(
            y_ptr, y_offsets, stride_yc, pixel_mask, rest_n, rest, bias_ptr, bias_offsets,
            stride_bias_c, CHANNELS, HAS_BIAS, BIAS_MAP, INDEX_64,
        )  # fmt: skip
