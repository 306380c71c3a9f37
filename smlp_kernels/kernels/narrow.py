"""Blocks of few channels: a launch along each axis does the products over channels, too.

Where a program holds all channels of a line, nothing but results goes through memory:

Forward:   y = Ph (x Fh') + bh rowsum(Fh)                   along H, left in y
           y += (x Fw') Pw' + bw rowsum(Fw) + x Fi' + bias  along W

Backward:  dx = Ph' (dy Fh)                                 along H, left in dx
           dx += (dy Fw) Pw + dy Fi                         along W
           dPh = sum (dy Fh) x', dbh = sum dy Fh            along H; those along W likewise
           dFh = sum dy' (Ph x + bh)                        along H; dFw likewise
           dFi = sum dy' x along H, db = sum dy along W

A tile is all positions of some lines, [ROWS, channels] with the lines of a position one after the
other, so that the same tile is [positions, lines' channels] for the products along the axis. The
forward moves 5 times x between the L2 cache and the multiprocessors and the backward 5 times and
dy twice for each slice of channels, where :mod:`smlp_kernels.kernels.axis` between products of
PyTorch moves 9 and 19 times x.
"""

import torch
import triton
import triton.language as tl

from smlp_kernels.launch import HOPPER, INT32_MAX, Plan, cdiv

ROWS = 64  # of a tile: positions, rounded up to a power of two, times lines


# neither the batch nor its split compiles another kernel
@triton.jit(do_not_specialize=["lines", "programs"])
def narrow_kernel(
    u_ptr,  # [pixels, C]: x in the forward, dy in the backward
    x_ptr,  # [pixels, C]; None in the forward
    out_ptr,  # [pixels, C]: y or dx; along W it has what was left there along H
    proj_ptr,  # [SIZE, SIZE] out, in
    bias_ptr,  # [SIZE] or None
    fuse_ptr,  # [C, 3C]: out, branch (h, w, identity), in
    fuse_bias_ptr,  # [C], or [H * W, C] for a MAP, or None
    partial_ptr,  # [SLICES * programs, SIZE * SIZE + SIZE]: sums of a program, as the next
    total_ptr,  # [programs, C, 3C + 1]: the gradients of fuse and of its bias
    lines,  # images * WIDTH along H, images * HEIGHT along W
    programs,  # of each slice
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALONG_H: tl.constexpr, MAP: tl.constexpr,
    POSITIONS: tl.constexpr,  # SIZE or more, a power of two up to ROWS
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,  # CHANNELS or more, a power of two: what the products add up
    SLICE: tl.constexpr,  # of the channels of out and x: those of a program
):  # fmt: skip
    """A program takes every ``programs``-th tile of a slice of the channels."""
    dtype = u_ptr.dtype.element_ty
    BACKWARD: tl.constexpr = x_ptr is not None
    SIZE: tl.constexpr = HEIGHT if ALONG_H else WIDTH
    STEP: tl.constexpr = WIDTH if ALONG_H else 1  # pixels from one position to the next
    LINES: tl.constexpr = ROWS // POSITIONS
    SLICES: tl.constexpr = (CHANNELS + SLICE - 1) // SLICE
    LINE: tl.constexpr = LINES * SLICE  # columns of a tile in the products along the axis
    pid = tl.program_id(0)
    part = pid // SLICES

    i = tl.arange(0, POSITIONS)
    k = tl.arange(0, POSITIONS)
    inside = (i < SIZE)[:, None] & (k < SIZE)[None, :]
    proj = tl.load(proj_ptr + i[:, None] * SIZE + k[None, :], mask=inside, other=0.0)
    d = tl.arange(0, DEPTH)
    c = pid % SLICES * SLICE + tl.arange(0, SLICE)
    weights = (d < CHANNELS)[:, None] & (c < CHANNELS)[None, :]
    branch_ptr = fuse_ptr if ALONG_H else fuse_ptr + CHANNELS
    if BACKWARD:
        fuse_offsets = d[:, None] * (3 * CHANNELS) + c[None, :]
    else:
        fuse_offsets = d[:, None] + c[None, :] * (3 * CHANNELS)
    fuse = tl.load(branch_ptr + fuse_offsets, mask=weights, other=0.0)  # [DEPTH, SLICE]
    if not ALONG_H:
        identity = tl.load(fuse_ptr + 2 * CHANNELS + fuse_offsets, mask=weights, other=0.0)
        if fuse_bias_ptr is not None and not MAP:
            fuse_bias = tl.load(fuse_bias_ptr + c, mask=c < CHANNELS, other=0.0)[None, :]
    r = tl.arange(0, ROWS)
    position = r // LINES
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + position, mask=position < SIZE, other=0.0).to(tl.float32)
        if not BACKWARD:
            row_sums = tl.sum(fuse.to(tl.float32), 0)
    if BACKWARD:
        gram = tl.zeros((POSITIONS, POSITIONS), tl.float32)
        gram_bias = tl.zeros((POSITIONS,), tl.float32)
        grad = tl.zeros((DEPTH, SLICE), tl.float32)
        if ALONG_H:
            grad_identity = tl.zeros((DEPTH, SLICE), tl.float32)
        else:
            grad_bias = tl.zeros((8, DEPTH), tl.float32)

    for tile in range(part, tl.cdiv(lines, LINES), programs):
        line = tile * LINES + r % LINES
        pixel = position * STEP
        pixel += line // WIDTH * (HEIGHT * WIDTH) + line % WIDTH if ALONG_H else line * WIDTH
        mask = ((position < SIZE) & (line < lines))[:, None]
        u_offsets = pixel[:, None] * CHANNELS + d[None, :]
        offsets = pixel[:, None] * CHANNELS + c[None, :]
        mask_c = mask & (c < CHANNELS)[None, :]
        u = tl.load(u_ptr + u_offsets, mask=mask & (d < CHANNELS)[None, :], other=0.0)
        if BACKWARD:
            x = tl.load(x_ptr + offsets, mask=mask_c, other=0.0)
        if not ALONG_H:
            rest = tl.load(out_ptr + offsets, mask=mask_c, other=0.0)
            if MAP:
                spot = pixel % (HEIGHT * WIDTH)
                bias_offsets = spot[:, None] * CHANNELS + c[None, :]
                fuse_bias = tl.load(fuse_bias_ptr + bias_offsets, mask=mask_c, other=0.0)

        g = tl.reshape(tl.dot(u, fuse).to(dtype), (POSITIONS, LINE))
        if BACKWARD:
            x_lines = tl.reshape(x, (POSITIONS, LINE))
            mixed = tl.reshape(tl.dot(proj, x_lines), (ROWS, SLICE))
            if bias_ptr is not None:
                mixed += bias[:, None]
            gram = tl.dot(g, tl.trans(x_lines), gram)
            gram_bias += tl.sum(g.to(tl.float32), 1)
            out = tl.reshape(tl.dot(tl.trans(proj), g), (ROWS, SLICE))
            grad = tl.dot(tl.trans(u), mixed.to(dtype), grad)
            if ALONG_H:
                grad_identity = tl.dot(tl.trans(u), x, grad_identity)
            else:  # each thread adds up its own rows
                grad_bias += tl.sum(tl.reshape(u, (ROWS // 8, 8, DEPTH)).to(tl.float32), 0)
        else:
            out = tl.reshape(tl.dot(proj, g), (ROWS, SLICE))
            if bias_ptr is not None:
                out += bias[:, None] * row_sums[None, :]
        if not ALONG_H:
            out = tl.dot(u, identity, out) + rest.to(tl.float32)
            if fuse_bias_ptr is not None:
                out += fuse_bias.to(tl.float32)
        tl.debug_barrier()  # of this program's warps: all have read what is now overwritten
        tl.store(out_ptr + offsets, out.to(dtype), mask=mask_c)

    if BACKWARD:
        partial_ptr += pid * (SIZE * (SIZE + 1))
        tl.store(partial_ptr + i[:, None] * SIZE + k[None, :], gram, mask=inside)
        tl.store(partial_ptr + SIZE * SIZE + i, gram_bias, mask=i < SIZE)
        total_ptr += (part * CHANNELS + d) * (3 * CHANNELS + 1)
        grad_ptr = total_ptr[:, None] + c[None, :]
        tl.store(grad_ptr if ALONG_H else grad_ptr + CHANNELS, grad, mask=weights)
        if ALONG_H:
            tl.store(grad_ptr + 2 * CHANNELS, grad_identity, mask=weights)
        elif pid % SLICES == 0:
            tl.store(total_ptr + 3 * CHANNELS, tl.sum(grad_bias, 0), mask=d < CHANNELS)


# Chips on which traffic of the L2 cache was measured to be the bottleneck.
ARCHS: tuple[int, ...] = (90,) if HOPPER else ()
PROGRAMS = 396  # at most; a constant, so that the order of sums does not depend on the chip
SLICE = 32  # of the backward, whose sums take most registers
REGISTERS = 168  # of a thread: three programs on a multiprocessor


def is_narrow(shape: torch.Size, dtype: torch.dtype, arch: int) -> bool:
    """Whether ``narrow_kernel`` takes blocks of such images; all tensors have to be ``is_rows``."""
    _, channels, height, width = shape
    fits = 32 < channels <= 128 and channels % 8 == 0 and max(height, width) <= ROWS
    return fits and arch in ARCHS and dtype.itemsize == 2 and 0 < shape.numel() <= INT32_MAX


def narrow_plans(shape: torch.Size, backward: bool, bias_map: bool = False) -> tuple[Plan, Plan]:
    """The launches along H and W for a batch; each program of a backward leaves partial sums."""
    batch, channels, height, width = shape
    depth = max(64, triton.next_power_of_2(channels))
    slices = cdiv(channels, SLICE) if backward else 1
    positions = [max(16, triton.next_power_of_2(size)) for size in (height, width)]
    lines = batch * width, batch * height
    tiles = [cdiv(n, ROWS // p) for n, p in zip(lines, positions, strict=True)]
    # of the forward along W only two fit a multiprocessor; those of the backward share sums
    most = PROGRAMS // slices, (PROGRAMS if backward else PROGRAMS * 2 // 3) // slices
    programs = [cdiv(n, cdiv(n, m)) for n, m in zip(tiles, most, strict=True)]  # of equal shares
    if backward:
        programs = [min(programs)] * 2

    def plan(axis: int) -> Plan:
        constants = {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "ALONG_H": axis == 0,
            "MAP": bias_map,
            "POSITIONS": positions[axis],
            "ROWS": ROWS,
            "DEPTH": depth,
            "SLICE": SLICE if backward else depth,
        }
        registers = REGISTERS if backward else None
        integers = lines[axis], programs[axis]
        return Plan(narrow_kernel, slices * programs[axis], integers, constants, 4, registers)

    return plan(0), plan(1)
