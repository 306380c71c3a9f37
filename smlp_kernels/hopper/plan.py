"""Which kernel takes a call, and how it is launched; decided without a GPU."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from smlp_kernels.kernels.rows import is_rows
from smlp_kernels.launch import INT32_MAX, PLANS, Call, Plan, Strides, cdiv
from smlp_kernels.weights import Weights, dense, in_type_of

WARPS = 12  # of a block: THREADS in layout.cuh
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TILE_CHANNELS, PASS_TILES = 64, 3  # output channels of a tile, tiles of a pass at most

RESIDENT_SIZE = 16  # largest H and W of the kernels that hold whole images
RESIDENT_STEP = 32  # input channels of a step
# Pixels of ``Images`` in layout.cuh, and how many lines of an axis, or pairs of lines of at most 8
# pixels, ``Mixer`` mixes.
TILES = {200: 21, 248: 18, 256: 18}
STRIPS_SIZE = 32  # largest H and W of the kernel that holds some lines of an image
STRIPS_PIXELS, STRIPS_LINES = 200, 8  # at most, of a strip
STRIPS_CHANNELS = PASS_TILES * TILE_CHANNELS  # a second pass would read all of x again

# A large forward of small images is left to cuBLAS: 38/47/62 us at 7x7, C 640/768/896, batch 128,
# against 38/53/69 here (H200). With ``fuse`` transposed, cuBLAS is the slower one.
CUBLAS_PIXELS = 4096

# Costs that the choice of a resident kernel weighs: a step of 1, 2, 3 tiles and 200 pixels, the end
# of a pass, the start of a block. Cycles estimated from the machine code; nothing was measured.
STEP_COST, PASS_COST, BLOCK_COST = (0, 1700, 2015, 2529), 2900, 2500


def call_of(x: Tensor, weights: Weights, sms: int) -> Call | None:
    """The launch for ``mix(x; weights)``, the output allocated, or None where no kernel applies.

    Args:
        x: [B, C, H, W].
        weights: any floating types and strides; converted to the type of x where they differ.
        sms: of the chip.
    """
    batch, channels, height, width = x.shape
    small, wide = max(height, width) <= 8, channels >= 512
    by_cublas = small and wide and batch * height * width >= CUBLAS_PIXELS
    if (
        x.dtype not in DTYPES
        or not batch
        or channels % 8
        or max(height, width) > largest_size(channels)
        or not is_rows(x)
        or (by_cublas and fuse_strides(weights.fuse)[2] == 1)
    ):
        return None
    proj_h, bias_h, proj_w, bias_w, fuse, bias = in_type_of(x, *weights)
    proj_strides = (*proj_h.stride(), *proj_w.stride())
    plan = make_plan(x.shape, x.dtype, proj_strides, fuse_strides(fuse), sms)
    if plan is None:
        return None
    bias_map: Tensor | None = None
    if bias is not None and bias.dim() == 3:
        bias_map, bias = bias.permute(1, 2, 0).contiguous(), None
    for copied_by_16_bytes in (x, fuse, bias_map):
        if copied_by_16_bytes is not None and copied_by_16_bytes.data_ptr() % 16:
            return None
    along = (proj_h, dense(bias_h), proj_w, dense(bias_w))
    return Call(plan, (x, torch.empty_like(x), *along, fuse, dense(bias), bias_map))


def largest_size(channels: int) -> int:
    """The largest H and W that a kernel takes."""
    return STRIPS_SIZE if channels <= STRIPS_CHANNELS else RESIDENT_SIZE


def fuse_strides(fuse: Tensor) -> Strides:
    """Out, branch and in."""
    strides = fuse.stride()
    return strides if len(strides) == 3 else (strides[0], fuse.shape[0] * strides[1], strides[1])


@functools.lru_cache(PLANS)
def make_plan(
    shape: torch.Size, dtype: torch.dtype, proj_strides: Strides, fuse_strides: Strides, sms: int
) -> Plan | None:
    """The plan for a shape that :func:`call_of` lets through, or None where strides do not suit.

    Strides are those of proj_h and then of proj_w, out and in, and of ``fuse``, out, branch and in.
    """
    batch, channels, height, width = shape
    fuse_out, fuse_branch, fuse_in = fuse_strides
    transposed = fuse_in != 1
    fuse_row = fuse_in if transposed else fuse_out
    if (transposed and fuse_out != 1) or fuse_row % 8 or fuse_branch % 8:
        return None
    largest = 2 * max(*proj_strides, *fuse_strides) * max(channels, STRIPS_SIZE)
    if max(largest, batch + STRIPS_PIXELS) > INT32_MAX:  # the kernels' integers
        return None
    tiles = cdiv(channels, TILE_CHANNELS)
    if max(height, width) > RESIDENT_SIZE:
        strips = cdiv(height, min(STRIPS_LINES, STRIPS_PIXELS // width))  # of equal sizes
        name, held, groups, passes, blocks = "strips", cdiv(height, strips), batch * strips, 1, 1
    else:
        _, pixels, images, passes, blocks = min(resident_choices(shape, sms))
        name, held, groups = str(pixels), images * height, cdiv(batch, images)
    zeros = min(3, (width & -width).bit_length() - 1)
    integers = (
        *(*shape, *proj_strides, fuse_branch, fuse_row),
        *(held, passes, blocks, (tiles << 16) // passes + 1),
        *(65536 // width + 1, 3 - zeros, (1 << zeros) - 1),
    )
    kernel = f"smlp_{DTYPES[dtype]}_{name}{'_t' * transposed}"
    return Plan(kernel, groups * blocks, integers, {}, num_warps=WARPS)


def resident_choices(shape: torch.Size, sms: int) -> Iterator[tuple[float, int, int, int, int]]:
    """Cost, pixels of a tile, images of a block, passes, blocks that share them out."""
    batch, channels, height, width = shape
    tiles, steps = cdiv(channels, TILE_CHANNELS), cdiv(channels, RESIDENT_STEP)
    for pixels, lines in TILES.items():
        # 256 pixels leave no room for padding, which only lines of 8 and 16 do without
        most = 248 if pixels == 256 and not {height, width} <= {8, 16} else pixels
        for images in range(1, most // (height * width) + 1):
            axes = ((height, images * width), (width, images * height))  # length, number of lines
            if max(cdiv(count, 2) if size <= 8 else count for size, count in axes) > lines:
                break
            for passes in {cdiv(tiles, most) for most in range(1, PASS_TILES + 1)}:  # tiles of each
                # as first_tile
                numbers = [(i + 1) * tiles // passes - i * tiles // passes for i in range(passes)]
                costs = [steps * STEP_COST[n] * pixels / 200 + PASS_COST for n in numbers]
                for blocks in range(1, passes + 1):
                    rounds = cdiv(cdiv(batch, images) * blocks, sms)
                    longest = max(sum(costs[i::blocks]) for i in range(blocks))
                    yield rounds * (BLOCK_COST + longest), pixels, images, passes, blocks
