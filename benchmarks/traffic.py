"""What the kernels move and compute, counted from their tiles: the input of the time model.

Counted per launch, over all programs. *Real* elements cost bytes, since masked lanes are not read;
*padded* elements cost matrix operations and shared memory, since the tile is there all the same.
The loops counted are those of :mod:`smlp_kernels.kernels`; a change there has to be made here too.
"""

from dataclasses import dataclass, fields
from math import ceil

from benchmarks.roofline import itemsize, weight_elements
from benchmarks.shapes import LAYOUTS, Shape
from smlp_kernels.configs import MixConfig, ProjectConfig, WeightGradConfig, has_long_axis

SECTOR = 32  # bytes, the least that L2 hands to an SM
WGMMA_ROWS = 64  # a product with fewer rows is made of mma.sync, whose least is MMA_ROWS
MMA_ROWS = 16
ACCUMULATOR = 4  # bytes of a float32 partial sum

# Instructions of a warp beside its matrix instructions, fitted to the loops of mix_kernel that
# Triton 3.7 makes for sm_90 in bf16: 157 a step at 14x14 with 8 accesses and 8 mma of a warp, 317
# at 56x56 with 20 and 32. The weight-gradient kernels' loops lie within a third of the fit.
PER_STEP = 58
PER_ACCESS = 11  # the copy, its address and predicate, the way through shared memory
BYTES_PER_ACCESS = 16 * 32
MMA_FLOPS = 2 * 16 * 8 * 16  # of one m16n8k16


@dataclass(frozen=True)
class Work:
    """Totals of one launch.

    Attributes:
        dram: bytes through device memory, every tensor once.
        l2: bytes from L2 to the SMs and back, in whole sectors, re-reads included.
        shared: bytes written to and read from shared memory.
        wgmma: flops of products of 64 rows or more, padding included.
        mma: flops of products of fewer rows, padded to 16 rows.
        instructions: of warps, roughly.
    """

    dram: float = 0.0
    l2: float = 0.0
    shared: float = 0.0
    wgmma: float = 0.0
    mma: float = 0.0
    instructions: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, count: float) -> "Work":
        return Work(*(count * getattr(self, f.name) for f in fields(self)))


def mix_work(shape: Shape, dtype: str, config: MixConfig, layout: str = "channels_last") -> Work:
    """One launch of ``mix_kernel``: a forward, or the gradient of x.

    Every program reads its tile, the whole rows and columns through it and three blocks of the
    channel weights for each block of input channels; all programs of other output channels read
    the same again. Of tiles that hold whole images the rows and columns are not read apart. Where
    an axis is long, the projection along H comes as a tensor, of which the tile is read.
    """
    size, c = itemsize(dtype), shape.channels
    projected = has_long_axis(shape.height, shape.width)
    tiles_h, tiles_w = ceil(shape.height / config.step_h), ceil(shape.width / config.step_w)
    tiles_n, steps = ceil(c / config.block_n), ceil(c / config.block_c)
    pixel_tiles = ceil(shape.batch / config.images) * tiles_h * tiles_w
    pixels = config.images * config.tile_h * config.tile_w
    # elements that cross L2: tile and columns in runs along w, rows in runs of whole lines
    tile, row = _run_factors(shape, config, size, layout)
    lines_read = 0 if config.holds_images(shape.height, shape.width) else 1
    columns_read = tile if projected else lines_read * tiles_h * tile
    x_reads = shape.elements * tiles_n * (tile + columns_read + lines_read * tiles_w * row)
    fuse_reads = pixel_tiles * 3 * c * c
    reads = (x_reads + fuse_reads) * size
    writes = shape.elements * tile * size

    columns = 0 if projected else config.images * config.tile_w * config.block_c
    rows = config.images * config.tile_h * config.block_c
    padded_h = config.block_h * ceil(shape.height / config.block_h)
    padded_w = config.block_w * ceil(shape.width / config.block_w)
    lines = columns * padded_h + rows * padded_w
    tiles = (2 if projected else 1) * pixels * config.block_c  # x, and x_h where it is a tensor
    copied = tiles + 3 * config.block_c * config.block_n + lines_read * lines
    # x_h and x_w, from the order of lines to that of pixels
    relayout = (1 if projected else 2) * pixels * config.block_c
    # each operand is written by the copy and read by a product, each relayout likewise; lines that
    # were not copied are read from the tile
    shared = (2 * (copied + relayout) + (1 - lines_read) * lines) * size
    mixing = product(config.tile_h, columns, padded_h) + product(config.tile_w, rows, padded_w)
    step = mixing + product(pixels, config.block_n, 3 * config.block_c)
    step += Work(shared=shared, instructions=instructions(config.num_warps, copied * size))
    y = pixels * config.block_n * size  # through shared memory, to be stored in whole sectors
    epilogue = Work(shared=2 * y, instructions=instructions(config.num_warps, y))
    weights = weight_elements(shape) * size
    return (step.times(steps) + epilogue).times(pixel_tiles * tiles_n) + Work(
        dram=(3 if projected else 2) * shape.elements * size + weights,
        l2=reads + writes,
    )


def project_work(
    shape: Shape, dtype: str, config: ProjectConfig, layout: str = "channels_last"
) -> Work:
    """One launch of ``project_h_kernel``: columns are read once for every tile of output rows."""
    size = itemsize(dtype)
    tiles_h = ceil(shape.height / config.block_h)
    steps = ceil(shape.height / config.block_k)
    # runs of a tile: the channels of some places, or the places of some channels
    contiguous = shape.channels * shape.width if layout == "channels_last" else shape.width
    run = min(config.block_lines, contiguous) * size
    factor = sector_factor(run, contiguous * size, size)
    copied = config.block_k * (config.block_h + config.block_lines)
    step = product(config.block_h, config.block_lines, config.block_k)
    step += Work(
        shared=2 * copied * size, instructions=instructions(config.num_warps, copied * size)
    )
    y = config.block_h * config.block_lines * size
    epilogue = Work(shared=2 * y, instructions=instructions(config.num_warps, y))
    programs = config.programs(shape.batch, shape.height, shape.width, shape.channels)
    return (step.times(steps) + epilogue).times(programs) + Work(
        dram=2 * shape.elements * size + shape.height**2 * size,
        l2=((tiles_h + 1) * shape.elements * factor + programs * shape.height * config.block_h)
        * size,
    )


def instructions(num_warps: int, copied: float, steps: int = 1) -> float:
    """Of ``steps`` steps of a loop of one program that copy ``copied`` bytes in all."""
    return steps * num_warps * PER_STEP + PER_ACCESS * copied / BYTES_PER_ACCESS


def product(rows: int, columns: int, depth: int) -> Work:
    """The matrix instructions of one ``tl.dot``, [rows, depth] x [depth, columns]."""
    if rows >= WGMMA_ROWS:  # one warpgroup instruction does thousands: no issue slots to speak of
        return Work(wgmma=2 * rows * columns * depth)
    flops = 2 * MMA_ROWS * ceil(rows / MMA_ROWS) * columns * depth
    return Work(mma=flops, instructions=flops / MMA_FLOPS)


def _run_factors(shape: Shape, config: MixConfig, size: int, layout: str) -> tuple[float, float]:
    """Bytes in whole sectors per byte asked for: of the tile and the columns, and of the rows."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "channels_last":
        run = min(config.block_c, shape.channels) * size
        factor = sector_factor(run, shape.channels * size, size)
        return factor, factor
    line = shape.width * size
    return sector_factor(config.step_w * size, line, size), sector_factor(line, line, size)


def sector_factor(run: int, pitch: int, size: int) -> float:
    """Bytes in whole sectors per byte of runs of ``run`` bytes that start every ``pitch`` bytes.

    Runs that do not all start on a sector straddle one more: on average ``run + SECTOR - size``
    bytes when they may start at any element of ``size`` bytes.
    """
    if run % SECTOR == 0 and pitch % SECTOR == 0:
        return 1.0
    if pitch % SECTOR == 0 and run < SECTOR and SECTOR % run == 0:
        return SECTOR / run
    return (run + SECTOR - size) / run


def proj_grad_work(shape: Shape, dtype: str, config: WeightGradConfig) -> Work:
    """One launch of ``proj_grad_kernel``, both axes.

    For each tile of lines and each block of x's channels, F' dy is computed from all of dy and all
    of F; blocks of positions come in pairs, so an axis of two blocks does everything four times.
    """
    size, c = itemsize(dtype), shape.channels
    blocks_o, blocks_c = ceil(c / config.proj_block_o), ceil(c / config.proj_block_c)
    padded_o, padded_c = blocks_o * config.proj_block_o, blocks_c * config.proj_block_c
    rows = config.proj_rows
    tile_of = config.proj_tile(shape.height, shape.width)
    total = Work()
    for axis, others in ((shape.height, shape.width), (shape.width, shape.height)):
        blocks = ceil(axis / tile_of.positions)
        tiles = blocks**2 * ceil(shape.batch * others / tile_of.lines)
        reads = (blocks * shape.elements * (blocks_c + 1) + tiles * c * c) * size
        # dy for every block of x's channels, F, x
        copied = size * (rows * padded_o * blocks_c + padded_o * padded_c)
        copied += size * rows * padded_c
        steps = blocks_c * (blocks_o + 1) + 1
        tile = loop_work(config, copied, steps)
        tile += product(rows, padded_c, padded_o) + product(rows, rows, padded_c)
        total += tile.times(tiles)
        total += Work(l2=reads)
    partial = _partial_bytes(*_partial_results(shape, config)[:2])
    return total + Work(dram=(2 * shape.elements + c * c * 2) * size + partial, l2=partial)


def loop_work(config: WeightGradConfig, copied: int, steps: int) -> Work:
    """What ``steps`` steps of a weight-gradient program cost beside products: bytes in and out."""
    return Work(shared=2 * copied, instructions=instructions(config.num_warps, copied, steps))


def fuse_grad_work(shape: Shape, dtype: str, config: WeightGradConfig) -> Work:
    """One launch of ``fuse_grad_kernel``, three branches.

    Every tile of dF reads its channels of dy and x; the two mixed branches mix x again for every
    tile of output channels.
    """
    size, c = itemsize(dtype), shape.channels
    blocks_o, blocks_c = ceil(c / config.fuse_block_o), ceil(c / config.fuse_block_c)
    block_o, block_c = config.fuse_block_o, config.fuse_block_c
    lines, positions = config.fuse_tile(shape.height, shape.width)
    rows = lines * positions
    summed = max(MMA_ROWS, positions)  # positions of x a step
    total = Work()
    for axis, others, mixes in (
        (shape.height, shape.width, True),
        (shape.width, shape.height, True),
        (shape.width, shape.height, False),
    ):
        blocks = ceil(axis / positions)
        mixed = blocks if mixes else 0
        tiles = blocks_o * blocks_c * ceil(shape.batch * others / lines) * blocks
        reads = shape.elements * (blocks_c + blocks_o * max(1, mixed)) * size
        # dy, and x as it is or in lines with a block of the projection
        x = mixed * summed * (lines * block_c + positions) if mixes else rows * block_c
        copied = size * (rows * block_o + x)
        tile = loop_work(config, copied, 1 + max(1, mixed)) + product(block_o, block_c, rows)
        if mixes:
            reads += tiles * blocks * min(positions, axis) ** 2 * size
            tile += product(positions, lines * block_c, summed).times(blocks)
            tile += Work(shared=2 * size * rows * block_c)  # mixed, to be the right operand
        total += tile.times(tiles) + Work(l2=reads)
    partial = _partial_bytes(_partial_results(shape, config)[2])
    return total + Work(dram=2 * shape.elements * size + partial, l2=partial)


def sums_work(shape: Shape, dtype: str, config: WeightGradConfig) -> Work:
    """One launch of ``partial_sums_kernel``: all partial results in, the gradients out."""
    results = _partial_results(shape, config)
    read = _partial_bytes(*results)
    written = itemsize(dtype) * sum(elements for _, elements in results)
    return Work(dram=read + written, l2=read + written)


def _partial_results(shape: Shape, config: WeightGradConfig) -> tuple[tuple[int, int], ...]:
    return config.partial_results(shape.batch, shape.height, shape.width, shape.channels)


def _partial_bytes(*results: tuple[int, int]) -> int:
    return ACCUMULATOR * sum(count * elements for count, elements in results)
