"""Which kernel takes a call, and what it is launched with; decided without a GPU."""

import functools
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from smlp_kernels.kernels.rows import is_rows
from smlp_kernels.launch import INT32_MAX, PLANS, Strides, cdiv
from smlp_kernels.weights import Weights, dense, in_type_of

THREADS = 384  # of a block
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TILE_CHANNELS, PASS_TILES = 64, 3  # output channels of a tile, tiles of a pass at most

RESIDENT_SIZE = 16  # largest H and W of the kernels that hold whole images
RESIDENT_STEP = 32  # input channels of a step
# ``Tile`` in resident.cuh: pixels, bytes of shared memory, and how many lines of an axis, or pairs
# of lines of at most 8 pixels, are mixed.
TILES = ((200, 224256, 21), (248, 232448, 18), (256, 232448, 18))
STRIPS_SIZE = 32  # largest H and W of the kernel that holds some lines of an image
STRIPS_PIXELS, STRIPS_LINES = 200, 8  # at most, of a strip
STRIPS_CHANNELS = PASS_TILES * TILE_CHANNELS  # a second pass would read all of x again
STRIPS_SHARED = 207872  # bytes: Strip::OFF_OUT and what follows

# A large forward of small images is left to cuBLAS: 38/47/62 us at 7x7, C 640/768/896, batch 128,
# against 38/53/69 here (H200). With ``fuse`` transposed it is slower.
CUBLAS_PIXELS = 4096

# What the choice of a resident kernel weighs: a step of 1, 2, 3 tiles and 200 pixels, the end of a
# pass, the start of a block. Cycles as estimated from the machine code; nothing was measured.
STEP_COST, PASS_COST, BLOCK_COST = (0, 1700, 2015, 2529), 2900, 2500

# x, y, proj_h, proj_w, bias_h, bias_w, fuse, bias, bias map, then a plan's integers: ``Params``
PARAMETERS = struct.Struct("9Q17i4x")


class Plan(NamedTuple):
    """All of a launch but the tensors."""

    kernel: str
    grid: tuple[int, int]
    shared: int  # bytes
    integers: tuple[int, ...]


class Call(NamedTuple):
    """A launch: its plan and the tensors in the order of ``PARAMETERS``."""

    plan: Plan
    tensors: tuple[Tensor | None, ...]

    def parameters(self) -> bytes:
        """The kernel's only argument."""
        pointers = (0 if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        return PARAMETERS.pack(*pointers, *self.plan.integers)


def call_of(x: Tensor, weights: Weights, sms: int) -> Call | None:
    """The launch for ``mix(x; weights)``, the output allocated, or None where no kernel applies.

    Args:
        x: [B, C, H, W].
        weights: any floating types and strides; converted to the type of x where they differ.
        sms: of the chip.
    """
    batch, channels, height, width = x.shape
    largest = STRIPS_SIZE if channels <= STRIPS_CHANNELS else RESIDENT_SIZE
    if (
        x.dtype not in DTYPES
        or not batch
        or channels % 8
        or max(height, width) > largest
        or not is_rows(x)
    ):
        return None
    plan = plan_for(x, weights, sms)
    if plan is None:
        return None
    given = [weight for weight in weights if weight is not None]
    converted = in_type_of(x, *given)
    if converted[0] is not given[0]:
        new = iter(converted)
        weights = Weights._make(None if weight is None else next(new) for weight in weights)
        plan = plan_for(x, weights, sms)  # what was not dense is so now
        if plan is None:
            return None
    proj_h, bias_h, proj_w, bias_w, fuse, bias = weights
    y = torch.empty_like(x)
    bias_map: Tensor | None = None
    if bias is not None and bias.dim() == 3:
        bias_map, bias = bias.permute(1, 2, 0).contiguous(), None
    for copied_by_16_bytes in (x, y, fuse, bias_map):
        if copied_by_16_bytes is not None and copied_by_16_bytes.data_ptr() % 16:
            return None
    return Call(
        plan, (x, y, proj_h, proj_w, dense(bias_h), dense(bias_w), fuse, dense(bias), bias_map)
    )


def plan_for(x: Tensor, weights: Weights, sms: int) -> Plan | None:
    """:func:`make_plan` with the strides of these weights."""
    strides = weights.fuse.stride()
    if len(strides) != 3:
        strides = (strides[0], x.shape[1] * strides[1], strides[1])
    proj_strides = (*weights.proj_h.stride(), *weights.proj_w.stride())
    return make_plan(x.shape, x.dtype, proj_strides, strides, sms)


@functools.lru_cache(PLANS)
def make_plan(
    shape: torch.Size, dtype: torch.dtype, proj_strides: Strides, fuse_strides: Strides, sms: int
) -> Plan | None:
    """The plan for a shape that :func:`call_of` lets through.

    Args:
        shape: B, C, H, W.
        dtype: of all tensors.
        proj_strides: out and in of proj_h, then of proj_w.
        fuse_strides: out, branch and in, of which out or in must be 1.
        sms: of the chip.

    Returns:
        None where strides do not suit the kernels, or where Triton and cuBLAS are faster.
    """
    batch, channels, height, width = shape
    fuse_out, fuse_branch, fuse_in = fuse_strides
    transposed = fuse_in != 1
    fuse_row = fuse_in if transposed else fuse_out
    largest = 2 * max(*proj_strides, *fuse_strides) * max(channels, STRIPS_SIZE)
    if (transposed and fuse_out != 1) or fuse_row % 8 or fuse_branch % 8:
        return None
    small, wide = max(height, width) <= 8, channels >= 512
    if small and wide and batch * height * width >= CUBLAS_PIXELS and not transposed:
        return None
    if max(largest, batch + STRIPS_PIXELS) > INT32_MAX:  # the kernels' integers
        return None
    tiles = cdiv(channels, TILE_CHANNELS)
    if max(height, width) > RESIDENT_SIZE:
        lines = strip_lines(height, width)
        name, shared, held = "strips", STRIPS_SHARED, lines
        grid, passes = (batch * cdiv(height, lines), 1), 1
    else:
        _, pixels, shared, held, passes, blocks = min(resident_choices(shape, sms))
        name, grid = str(pixels), (cdiv(batch, held), blocks)
    zeros = min(3, (width & -width).bit_length() - 1)
    h_out, h_in, w_out, w_in = proj_strides
    integers = (
        *(batch, channels, height, width, held),
        *(h_out, w_out, h_in, w_in, fuse_branch, fuse_row),
        *(passes, grid[1], (tiles << 16) // passes + 1),
        *(65536 // width + 1, 3 - zeros, (1 << zeros) - 1),
    )
    return Plan(f"smlp_{DTYPES[dtype]}_{name}{'_t' * transposed}", grid, shared, integers)


def strip_lines(height: int, width: int) -> int:
    """Lines of a strip: as few strips as possible, of equal sizes."""
    lines = min(STRIPS_LINES, STRIPS_PIXELS // width)
    return cdiv(height, cdiv(height, lines))


def resident_choices(
    shape: torch.Size, sms: int
) -> Iterator[tuple[float, int, int, int, int, int]]:
    """Cost, pixels and bytes of a tile, images of a block, passes, blocks that share them out."""
    batch, channels, height, width = shape
    tiles, steps = cdiv(channels, TILE_CHANNELS), cdiv(channels, RESIDENT_STEP)
    for pixels, shared, lines in TILES:
        images = 1
        while fits(pixels, lines, images, height, width):
            for passes in {cdiv(tiles, most) for most in range(1, PASS_TILES + 1)}:  # tiles of each
                ends = [i * tiles // passes for i in range(passes + 1)]  # as first_tile
                costs = [
                    steps * STEP_COST[end - first] * pixels / 200 + PASS_COST
                    for first, end in pairwise(ends)
                ]
                for blocks in range(1, passes + 1):
                    rounds = cdiv(cdiv(batch, images) * blocks, sms)
                    longest = max(sum(costs[i::blocks]) for i in range(blocks))
                    cost = rounds * (BLOCK_COST + longest)
                    yield cost, pixels, shared, images, passes, blocks
            images += 1


def fits(pixels: int, lines: int, images: int, height: int, width: int) -> bool:
    """Whether a tile takes this many images."""
    # 256 pixels leave no room for padding, which only lines of 8 and 16 do without
    if pixels == 256 and not {height, width} <= {8, 16}:
        pixels = 248
    axes = ((height, images * width), (width, images * height))  # length and number of lines
    mixed = max(cdiv(count, 2) if size <= 8 else count for size, count in axes)
    return mixed <= lines and images * height * width <= pixels
