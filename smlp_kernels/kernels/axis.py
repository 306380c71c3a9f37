"""The kernel that mixes along an axis: in the forward, and between the backward's two products.

Forward:   [x_h | x_w | x] = [Ph x + bh | x Pw' + bw | x]    here, along H and W in one launch
           y = [x_h | x_w | x] F' + bias                     after, a product over channels

Backward:  G = dy F = [Gh | Gw | Gi]                         before, a product over channels
           dx = Ph' Gh + Gw Pw + Gi                          here, first along H, then along W
           dPh = sum Gh x', dbh = sum Gh, and those along W  here
           dF, db = dy' [x_h | x_w | x | 1]                  after, a product over pixels

In the backward the kernel turns [Gh | Gw | Gi | .] into [x_h | x_w | x | 1] where it lies, leaving
dx and the gradients of the projections; the forward is the part of it that needs no G. A tile is
all positions of some columns, which are the lines' channels one after the other: in this shape,
[positions, columns], every product is a plain one. Nothing is read twice in a launch, and no
element is touched by two programs. A launch takes a chunk of the batch whose offsets fit 31 bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from smlp_kernels.kernels.rows import chunk_images
from smlp_kernels.kernels.tiles import AxisRow, axis_row
from smlp_kernels.launch import Plan, cdiv


@triton.jit
def run_along(
    pid,
    g_ptr,  # [pixels, COLUMNS]: Gh, Gw, Gi or nothing yet, and room for ones
    x_ptr,  # [pixels, C]; None where only dx is wanted
    dx_ptr,  # [pixels, C]; None along H, or where dx is not wanted
    proj_ptr,  # [SIZE, SIZE] out, in; TRANSPOSED: in, out
    bias_ptr,  # [SIZE] or None
    partial_ptr,  # [programs, SIZE * SIZE + SIZE]: what a program has added up; None if not wanted
    lines,  # images * WIDTH along H, images * HEIGHT along W
    programs,
    first,  # 1 for the first chunk of a batch: nothing was added up before
    TRANSPOSED: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALONG_H: tl.constexpr,  # in the backward it runs first, and leaves Ph' Gh + Gi in place of Gi
    NEED_X: tl.constexpr, NEED_FUSE: tl.constexpr,  # dx; [x_h | x_w | x | 1]
    POSITIONS: tl.constexpr,  # SIZE or more, a power of two
    TILE: tl.constexpr,  # columns
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What program ``pid`` does: every ``programs``-th tile."""
    dtype = g_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = HEIGHT if ALONG_H else WIDTH
    STEP: tl.constexpr = WIDTH if ALONG_H else 1  # pixels from one position to the next
    i = tl.arange(0, POSITIONS)
    k = tl.arange(0, POSITIONS)
    offsets = i[:, None] + k[None, :] * SIZE if TRANSPOSED else i[:, None] * SIZE + k[None, :]
    inside = (i < SIZE)[:, None] & (k < SIZE)[None, :]
    proj = tl.load(proj_ptr + offsets, mask=inside, other=0.0)
    if NEED_FUSE and bias_ptr is not None:
        bias = tl.load(bias_ptr + i, mask=i < SIZE, other=0.0).to(ACC)
    if partial_ptr is not None:
        partial_ptr += pid * (SIZE * (SIZE + 1))
        gram_ptr = partial_ptr + (i[:, None] * SIZE + k[None, :])
        total_ptr = partial_ptr + SIZE * SIZE + i
        later = i * 0 == first  # a vector: Triton 3.9's interpreter takes no mask with a scalar
        gram = tl.load(gram_ptr, mask=inside & later[:, None], other=0.0)
        total = tl.load(total_ptr, mask=(i < SIZE) & later, other=0.0)
    axis_ptr = g_ptr if ALONG_H else g_ptr + CHANNELS
    identity_ptr = g_ptr + 2 * CHANNELS

    n = tl.arange(0, TILE)
    for tile in range(pid, tl.cdiv(lines * CHANNELS, TILE), programs):
        column = tile * TILE + n
        line, c = column // CHANNELS, column % CHANNELS
        mask = (i < SIZE)[:, None] & (column < lines * CHANNELS)[None, :]
        pixel = line // WIDTH * (HEIGHT * WIDTH) + line % WIDTH if ALONG_H else line * WIDTH
        x_offsets = i[:, None] * (STEP * CHANNELS) + (pixel * CHANNELS + c)[None, :]
        g_offsets = i[:, None] * (STEP * COLUMNS) + (pixel * COLUMNS + c)[None, :]

        # [POSITIONS, TILE], zero beyond the image; x last: the others are then in flight before the
        # first product waits
        if NEED_X:
            rest = tl.load(identity_ptr + g_offsets, mask=mask, other=0.0)
        if NEED_X or partial_ptr is not None:
            g = tl.load(axis_ptr + g_offsets, mask=mask, other=0.0)
        if NEED_FUSE or partial_ptr is not None:
            x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
        if NEED_X:
            dx = tl.dot(tl.trans(proj), g, out_dtype=ACC, input_precision=PRECISION) + rest.to(ACC)
        if partial_ptr is not None:
            gram = tl.dot(g, tl.trans(x), gram, out_dtype=ACC, input_precision=PRECISION)
            total += tl.sum(g.to(ACC), 1)
        if NEED_FUSE:
            mixed = tl.dot(proj, x, out_dtype=ACC, input_precision=PRECISION)
            if bias_ptr is not None:
                mixed += bias[:, None]

        tl.debug_barrier()  # of this program's warps: all have read what is now written over
        if NEED_FUSE:
            tl.store(axis_ptr + g_offsets, mixed.to(dtype), mask=mask)
        if ALONG_H:
            if NEED_X:
                tl.store(identity_ptr + g_offsets, dx.to(dtype), mask=mask)
        else:
            if NEED_X:
                tl.store(dx_ptr + x_offsets, dx.to(dtype), mask=mask)
            if NEED_FUSE:
                tl.store(identity_ptr + g_offsets, x, mask=mask)
                PAD: tl.constexpr = COLUMNS - 3 * CHANNELS
                tl.store(g_ptr + 3 * CHANNELS + g_offsets, 1.0, mask=mask & (c < PAD)[None, :])

    if partial_ptr is not None:
        tl.store(gram_ptr, gram, mask=inside)
        tl.store(total_ptr, total, mask=i < SIZE)


@triton.jit(do_not_specialize=["lines", "programs", "first"])  # a new batch size: no new kernel
def axis_kernel(
    g_ptr, x_ptr, dx_ptr, proj_ptr, bias_ptr, partial_ptr, lines, programs, first,
    TRANSPOSED: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALONG_H: tl.constexpr, NEED_X: tl.constexpr, NEED_FUSE: tl.constexpr,
    POSITIONS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``run_along`` one axis; arguments as there."""
    run_along(
        tl.program_id(0), g_ptr, x_ptr, dx_ptr, proj_ptr, bias_ptr, partial_ptr, lines, programs,
        first, TRANSPOSED, CHANNELS, COLUMNS, HEIGHT, WIDTH, ALONG_H, NEED_X, NEED_FUSE,
        POSITIONS, TILE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["lines_h", "lines_w", "programs_h", "programs_w"])
def both_axes_kernel(
    rows_ptr,  # [pixels, COLUMNS]: becomes [x_h | x_w | x | 1]
    x_ptr,  # [pixels, C]
    proj_h_ptr,  # [H, H] out, in
    bias_h_ptr,  # [H] or None
    proj_w_ptr,  # [W, W] out, in
    bias_w_ptr,  # [W] or None
    lines_h, programs_h, lines_w, programs_w,
    TRANSPOSED_H: tl.constexpr, TRANSPOSED_W: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    POSITIONS_H: tl.constexpr, TILE_H: tl.constexpr,
    POSITIONS_W: tl.constexpr, TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward along H by the first programs, along W by the others."""
    pid = tl.program_id(0)
    if pid < programs_h:
        run_along(
            pid, rows_ptr, x_ptr, None, proj_h_ptr, bias_h_ptr, None, lines_h, programs_h, 1,
            TRANSPOSED_H, CHANNELS, COLUMNS, HEIGHT, WIDTH, True, False, True,
            POSITIONS_H, TILE_H, PRECISION,
        )  # fmt: skip
    else:
        run_along(
            pid - programs_h, rows_ptr, x_ptr, None, proj_w_ptr, bias_w_ptr, None, lines_w,
            programs_w, 1, TRANSPOSED_W, CHANNELS, COLUMNS, HEIGHT, WIDTH, False,
            False, True, POSITIONS_W, TILE_W, PRECISION,
        )  # fmt: skip


class Axis(NamedTuple):
    """What the launches along one axis of a batch have in common."""

    size: tuple[int, int, int]  # C, H, W
    along_h: bool
    need_x: bool
    need_proj: bool
    need_fuse: bool
    tile: AxisRow | None  # the row that it is from
    programs: int
    precision: str

    @property
    def partial(self) -> tuple[int, int]:
        """Shape of the partial results."""
        size = self.size[1 if self.along_h else 2]
        return self.programs if self.need_proj else 0, size * (size + 1)

    @property
    def is_needed(self) -> bool:
        """Whether anything is to be computed."""
        return self.need_x or self.need_proj or self.need_fuse


def make_axis(
    size: tuple[int, int, int],
    along_h: bool,
    needs: tuple[bool, bool, bool],
    images: int,
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> Axis:
    """An axis of a batch.

    Args:
        size: C, H, W.
        along_h: which axis.
        needs: dx, the gradient of the projection, [x_h | x_w | x | 1].
        images: of a chunk.
        dtype: of x.
        precision: of products of float32, "ieee" or "tf32".
        arch: ten times the compute capability.
    """
    channels, height, width = size
    length, lines = (height, width) if along_h else (width, height)
    tile = axis_row(length, dtype, arch, not (needs[0] or needs[1]))
    programs = 1
    if tile is not None:  # programs of equally many tiles
        tiles = cdiv(images * lines * channels, tile.columns)
        programs = cdiv(tiles, cdiv(tiles, tile.programs))
    return Axis(size, along_h, *needs, tile, programs, precision)


def split_batch(
    shape: torch.Size,
    needs: tuple[tuple[bool, bool, bool], tuple[bool, bool, bool]],
    copies: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> tuple[int, Axis, Axis]:
    """Images of a chunk, and the axes of one.

    Args:
        shape: B, C, H, W.
        needs: of each axis, as in :func:`make_axis`.
        copies: [pixels, C] that take scratch memory, too: always, and where an axis has no tile.
        dtype: of x.
        precision: of products of float32, "ieee" or "tf32".
        arch: ten times the compute capability.
    """
    batch, channels, height, width = shape

    def axes_of(images: int) -> tuple[Axis, Axis]:
        common = (images, dtype, precision, arch)
        h = make_axis((channels, height, width), True, needs[0], *common)
        return h, make_axis((channels, height, width), False, needs[1], *common)

    by_products = any(axis.tile is None for axis in axes_of(1))
    columns = matrix_columns(channels) + (copies[0] + copies[1] * by_products) * channels
    images = chunk_images(batch, height * width * columns * dtype.itemsize)
    return images, *axes_of(images)


def matrix_columns(channels: int) -> int:
    """Of [x_h | x_w | x | 1]: whole sectors of 32 bytes, since writing parts of them is slow."""
    return cdiv(3 * channels + 1, 16) * 16


def both_axes_plan(h: Axis, w: Axis, pixels: int, transposed: tuple[bool, bool]) -> Plan | None:
    """The plan of ``both_axes_kernel``, or None where the axes' tiles do not go together."""
    channels, height, width = h.size
    if h.tile is None or w.tile is None:
        return None
    if (h.tile.num_warps, h.tile.registers) != (w.tile.num_warps, w.tile.registers):
        return None
    return Plan(
        both_axes_kernel,
        h.programs + w.programs,
        (pixels // height, h.programs, pixels // width, w.programs),
        {
            "TRANSPOSED_H": transposed[0],
            "TRANSPOSED_W": transposed[1],
            "CHANNELS": channels,
            "COLUMNS": matrix_columns(channels),
            "HEIGHT": height,
            "WIDTH": width,
            "POSITIONS_H": h.tile.positions,
            "TILE_H": h.tile.columns,
            "POSITIONS_W": w.tile.positions,
            "TILE_W": w.tile.columns,
            "PRECISION": h.precision,
        },
        h.tile.num_warps,
        h.tile.registers,
    )


def axis_plan(axis: Axis, pixels: int, first: bool, transposed: bool) -> Plan | None:
    """The plan of ``axis_kernel`` for a chunk of the batch, the first or a later one.

    None where there is nothing to do, or no tile to do it with.
    """
    channels, height, width = axis.size
    tile = axis.tile
    if tile is None or not axis.is_needed:
        return None
    return Plan(
        axis_kernel,
        axis.programs,
        (pixels // (height if axis.along_h else width), axis.programs, int(first)),
        {
            "TRANSPOSED": transposed,
            "CHANNELS": channels,
            "COLUMNS": matrix_columns(channels),
            "HEIGHT": height,
            "WIDTH": width,
            "ALONG_H": axis.along_h,
            "NEED_X": axis.need_x,
            "NEED_FUSE": axis.need_fuse,
            "POSITIONS": tile.positions,
            "TILE": tile.columns,
            "PRECISION": axis.precision,
        },
        tile.num_warps,
        tile.registers,
    )
