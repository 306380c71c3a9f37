"""The kernel that mixes along an axis: in the forward, and between the backward's two products.

Forward:   [x_h | x_w | x] = [Ph x + bh | x Pw' + bw | x]    here, along H and W in one launch
           y = [x_h | x_w | x] F' + bias                     after, a product over channels

Backward:  G = dy F = [Gh | Gw | Gi]                         before, a product over channels
           dx = Ph' Gh + Gw Pw + Gi                          here, first along H, then along W
           dPh = sum Gh x', dbh = sum Gh, and those along W  here
           dF, db = dy' [x_h | x_w | x | 1]                  after, a product over pixels

In the backward the kernel turns [Gh | Gw | Gi | .] into [x_h | x_w | x | 1] in place, and leaves
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
    dx_ptr,  # [pixels, C]; None where dx is not wanted
    proj_ptr,  # [SIZE, SIZE] out, in
    bias_ptr,  # [SIZE] or None
    partial_ptr,  # [programs, SIZE * SIZE + SIZE]: what a program has added up; None if not wanted
    images,
    programs,
    first,  # 1 for the first chunk of a batch: nothing was added up before
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALONG_H: tl.constexpr,  # in the backward it runs first, and leaves Ph' Gh + Gi in place of Gi
    NEED_X: tl.constexpr, NEED_FUSE: tl.constexpr,  # dx; [x_h | x_w | x | 1]
    POSITIONS: tl.constexpr,  # SIZE or more, a power of two
    TILE: tl.constexpr,  # columns
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Process every ``programs``-th tile, starting at ``pid``."""
    dtype = g_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    SIZE: tl.constexpr = HEIGHT if ALONG_H else WIDTH
    STEP: tl.constexpr = WIDTH if ALONG_H else 1  # pixels from one position to the next
    i = tl.arange(0, POSITIONS)
    k = tl.arange(0, POSITIONS)
    inside = (i < SIZE)[:, None] & (k < SIZE)[None, :]
    proj = tl.load(proj_ptr + i[:, None] * SIZE + k[None, :], mask=inside, other=0.0)
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

    lines = images * (WIDTH if ALONG_H else HEIGHT)
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

        tl.debug_barrier()  # of this program's warps: all have read what is now overwritten
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


# a new batch size compiles no other kernel
@triton.jit(do_not_specialize=["images", "programs_h", "programs_w", "first"])
def axes_kernel(
    g_ptr, x_ptr, dx_ptr,
    proj_h_ptr, bias_h_ptr, partial_h_ptr,
    proj_w_ptr, bias_w_ptr, partial_w_ptr,
    images, programs_h, programs_w, first,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALONG_H: tl.constexpr,  # None: by the first programs, and along W by the others
    NEED_X: tl.constexpr, NEED_FUSE: tl.constexpr,
    POSITIONS_H: tl.constexpr, TILE_H: tl.constexpr,
    POSITIONS_W: tl.constexpr, TILE_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``run_along`` an axis, or both in a forward; arguments as there."""
    pid = tl.program_id(0)
    if pid < programs_h if ALONG_H is None else ALONG_H:
        run_along(
            pid, g_ptr, x_ptr, dx_ptr, proj_h_ptr, bias_h_ptr, partial_h_ptr, images, programs_h,
            first, CHANNELS, COLUMNS, HEIGHT, WIDTH, True, NEED_X, NEED_FUSE,
            POSITIONS_H, TILE_H, PRECISION,
        )  # fmt: skip
    else:
        run_along(
            pid - programs_h, g_ptr, x_ptr, dx_ptr, proj_w_ptr, bias_w_ptr, partial_w_ptr, images,
            programs_w, first, CHANNELS, COLUMNS, HEIGHT, WIDTH, False, NEED_X, NEED_FUSE,
            POSITIONS_W, TILE_W, PRECISION,
        )  # fmt: skip


class Needed(NamedTuple):
    """Which gradients are wanted; that of a weight always comes with that of its bias."""

    x: bool
    proj_h: bool
    proj_w: bool
    fuse: bool  # for which [x_h | x_w | x | 1] is computed, as in a forward


FORWARD = Needed(x=False, proj_h=False, proj_w=False, fuse=True)


class Axes(NamedTuple):
    """What is launched along both axes of every chunk of a batch."""

    size: tuple[int, int, int]  # C, H, W
    needed: Needed
    tiles: tuple[AxisRow | None, AxisRow | None]  # along H, along W
    programs: tuple[int, int]
    precision: str

    def plans(self, images: int, first: bool) -> tuple[Plan | bool, ...]:
        """The launches for a chunk of so many images, in order.

        An axis that no tile holds has no plan; in its place is True for H, False for W.
        """
        h, w = self.tiles
        alike = h and w and (h.num_warps, h.registers) == (w.num_warps, w.registers)
        if self.needed == FORWARD and alike:
            return (self.plan(images, first, h, None),)
        wanted = {True: (h, self.needed.proj_h), False: (w, self.needed.proj_w)}
        return tuple(
            along_h if tile is None else self.plan(images, first, tile, along_h)
            for along_h, (tile, need_proj) in wanted.items()
            if need_proj or self.needed.x or self.needed.fuse
        )

    def plan(self, images: int, first: bool, tile: AxisRow, along_h: bool | None) -> Plan:
        """A launch by the warps and registers of a tile."""
        channels, height, width = self.size
        h, w = self.tiles
        programs_h = 0 if along_h is False else self.programs[0]
        programs_w = 0 if along_h else self.programs[1]
        return Plan(
            axes_kernel,
            programs_h + programs_w,
            (images, programs_h, programs_w, int(first)),
            {
                "CHANNELS": channels,
                "COLUMNS": matrix_columns(channels),
                "HEIGHT": height,
                "WIDTH": width,
                "ALONG_H": along_h,
                "NEED_X": self.needed.x,
                "NEED_FUSE": self.needed.fuse,
                "POSITIONS_H": h and h.positions,
                "TILE_H": h and h.columns,
                "POSITIONS_W": w and w.positions,
                "TILE_W": w and w.columns,
                "PRECISION": self.precision,
            },
            tile.num_warps,
            tile.registers,
        )


def split_batch(
    shape: torch.Size,
    needed: Needed,
    copies: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    arch: int,
) -> tuple[int, Axes]:
    """Images of a chunk, and what is launched along its axes.

    Args:
        shape: B, C, H, W.
        needed: what is computed.
        copies: further [pixels, C] in scratch memory: in any case, and if an axis has no tile.
        dtype: of x.
        precision: of products of float32, "ieee" or "tf32".
        arch: ten times the compute capability.
    """
    batch, channels, height, width = shape
    h = axis_row(height, dtype, arch, not (needed.x or needed.proj_h))
    w = axis_row(width, dtype, arch, not (needed.x or needed.proj_w))
    columns = matrix_columns(channels) + copies[0] * channels
    if h is None or w is None:
        columns += copies[1] * channels
    images = chunk_images(batch, height * width * columns * dtype.itemsize)

    def programs(tile: AxisRow | None, lines: int) -> int:
        """Programs with equally many tiles each."""
        if tile is None:
            return 1
        tiles = cdiv(images * lines * channels, tile.columns)
        return cdiv(tiles, cdiv(tiles, tile.programs))

    counts = programs(h, width), programs(w, height)
    return images, Axes((channels, height, width), needed, (h, w), counts, precision)


def matrix_columns(channels: int) -> int:
    """Of [x_h | x_w | x | 1]: whole sectors of 32 bytes, since writing parts of one is slow."""
    return cdiv(3 * channels + 1, 16) * 16
