"""Which tile for which shape and chip: a shipped table and a rule for everything else.

Nothing is searched at the first call and nothing depends on the batch size, so that neither a new
batch size nor another rank of the same job compiles or runs anything different.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

MAX_SIZE = 256  # largest H and W on the kernels
LONG = 64  # an axis longer than this is long: the projection along H is a launch of its own
MAX_CHANNELS = 2048  # largest C on the kernels
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class MixConfig:
    """A tile of ``mix_kernel``: images x tile_h x tile_w pixels by block_n output channels."""

    images: int
    tile_h: int  # powers of two; step_h and step_w of the tile are used
    tile_w: int
    step_h: int
    step_w: int
    block_c: int  # input channels a step
    block_n: int  # output channels, a width
    block_h: int  # rows of a column taken by one mixing product
    block_w: int
    num_warps: int
    num_stages: int

    def holds_images(self, height: int, width: int) -> bool:
        """Whether a tile is whole images, which the kernel then reads once."""
        # 16: the least that a product can sum over
        return self.step_h >= height and self.step_w >= width and min(self.tile_h, self.tile_w) > 15

    def programs(self, batch: int, height: int, width: int, channels: int) -> int:
        """Number of programs of a launch."""
        tiles = triton.cdiv(height, self.step_h) * triton.cdiv(width, self.step_w)
        return triton.cdiv(batch, self.images) * tiles * triton.cdiv(channels, self.block_n)


@dataclass(frozen=True)
class ProjectConfig:
    """A tile of ``project_h_kernel``: block_h output rows by block_lines columns."""

    block_h: int
    block_lines: int  # columns: one for every place on W and channel
    block_k: int  # input rows a step
    num_warps: int
    num_stages: int

    def programs(self, batch: int, height: int, width: int, channels: int) -> int:
        """Number of programs of a launch."""
        lines = triton.cdiv(width * channels, self.block_lines)
        return batch * lines * triton.cdiv(height, self.block_h)


class MixRow(NamedTuple):
    """A row of ``MIX_TABLE``: what it is for, then the largest tile to take there."""

    arch: int | None  # ten times the compute capability; None: every chip
    kind: str  # of kind_of
    channels_last: bool | None  # None: every layout
    size: int  # H and W at most
    images: int
    tile_h: int
    tile_w: int
    block_c: int
    block_n: int
    block_k: int  # block_h and block_w
    num_warps: int
    num_stages: int


class ProjectRow(NamedTuple):
    """A row of ``PROJECT_TABLE``: what it is for, then the largest blocks to take there."""

    arch: int | None
    kind: str
    channels_last: bool | None
    config: ProjectConfig


# The first row whose tile an image fills is taken, else the last one that applies: the rule for
# what has no row of its own. Rows are kept only where the compiled kernel has no spills in its
# loops, no serialized matrix products and fits the chip (python -m smlp_kernels.aot_report); among
# those, a row for one chip is the one with the least predicted time (python -m benchmarks.model).
#
# Products of 16-bit types and TF32 run on tensor cores everywhere. Those of float32 and, but for
# data-center chips, float64 run on ordinary cores and keep whole operands in registers, hence small
# blocks of the summed axis and more warps. Channels-first loads take more registers for addresses.
MIX_TABLE = (
    # chip  kind       layout  H, W   images x tile  block_c n   k  warps, stages
    MixRow(90, "16-bit", True, 8, 4, 8, 8, 16, 160, 64, 8, 2),
    MixRow(90, "16-bit", True, 16, 1, 16, 16, 32, 160, 64, 8, 3),
    MixRow(90, "16-bit", True, 32, 1, 16, 16, 16, 192, 64, 8, 2),
    MixRow(90, "16-bit", True, 64, 1, 16, 16, 16, 128, 64, 8, 2),
    MixRow(90, "16-bit", False, 8, 2, 8, 8, 16, 256, 16, 8, 2),
    MixRow(90, "16-bit", False, 16, 1, 16, 16, 16, 160, 64, 8, 2),
    MixRow(90, "16-bit", False, 32, 1, 8, 16, 16, 256, 64, 8, 2),
    MixRow(90, "16-bit", False, 64, 1, 8, 16, 16, 128, 64, 8, 2),
    MixRow(90, "tf32", True, 8, 4, 8, 8, 16, 160, 16, 8, 2),
    MixRow(90, "tf32", True, 16, 1, 16, 16, 16, 160, 16, 8, 3),
    MixRow(90, "tf32", True, 32, 1, 8, 16, 16, 256, 32, 8, 2),
    MixRow(90, "tf32", True, 64, 1, 16, 8, 16, 128, 64, 8, 2),
    MixRow(90, "tf32", False, 8, 2, 8, 8, 16, 128, 16, 8, 2),
    MixRow(90, "tf32", False, 32, 1, 8, 16, 16, 256, 32, 8, 2),
    MixRow(90, "tf32", False, 64, 1, 16, 8, 16, 128, 32, 8, 2),
    MixRow(80, "16-bit", True, 16, 1, 16, 16, 16, 128, 64, 8, 3),
    MixRow(80, "16-bit", True, 64, 1, 16, 16, 16, 128, 64, 8, 2),
    MixRow(None, "16-bit", None, 16, 1, 16, 16, 16, 64, 64, 8, 3),
    MixRow(None, "16-bit", True, 32, 1, 8, 16, 16, 128, 64, 8, 2),
    MixRow(None, "16-bit", True, 64, 1, 8, 16, 16, 64, 64, 8, 2),
    MixRow(None, "16-bit", None, 64, 1, 8, 8, 16, 64, 64, 4, 2),
    MixRow(None, "tf32", None, 16, 1, 16, 16, 16, 64, 16, 8, 2),
    MixRow(None, "tf32", True, 64, 1, 8, 8, 16, 64, 16, 8, 2),
    MixRow(None, "tf32", False, 64, 1, 8, 8, 16, 64, 32, 8, 2),
    MixRow(None, "float32", None, 64, 1, 8, 8, 16, 64, 16, 8, 2),
    MixRow(None, "float64", None, 64, 1, 4, 8, 16, 32, 16, 8, 1),
)
# Where an axis is long, the projection along H is there already, and wide tiles read a row least
# often. These two tables follow from that; no other tiles were compared with them.
LONG_MIX_TABLE = (
    # chip  kind       layout  H, W   images x tile  block_c n   k  warps, stages
    MixRow(90, "16-bit", None, 256, 1, 2, 128, 32, 128, 64, 8, 2),
    MixRow(None, "16-bit", None, 256, 1, 1, 128, 32, 128, 64, 8, 2),
    MixRow(None, "tf32", None, 256, 1, 1, 128, 16, 64, 32, 8, 2),
    MixRow(None, "float32", None, 256, 1, 1, 64, 16, 64, 16, 8, 2),
    MixRow(None, "float64", None, 256, 1, 1, 32, 16, 32, 16, 8, 1),
)
PROJECT_TABLE = (
    # chip  kind       layout          block_h, lines, k, warps, stages
    ProjectRow(90, "16-bit", None, ProjectConfig(128, 128, 64, 8, 3)),
    ProjectRow(None, "16-bit", None, ProjectConfig(64, 128, 32, 4, 3)),
    ProjectRow(None, "tf32", None, ProjectConfig(64, 128, 32, 8, 3)),
    ProjectRow(None, "float32", None, ProjectConfig(64, 64, 16, 8, 2)),
    ProjectRow(None, "float64", None, ProjectConfig(32, 64, 16, 8, 1)),
)


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of rows for an input type and the precision of its products."""
    if dtype == torch.float64:
        return "float64"
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "float32"
    return "16-bit"


def even_step(size: int, tile: int) -> int:
    """Positions of a tile to use so that all tiles along ``size`` share the work evenly."""
    return triton.cdiv(size, triton.cdiv(size, tile))


def block_of(size: int, most: int) -> int:
    """The smallest power of two that holds ``size``, from 16 (a product's least) to ``most``."""
    return min(most, max(16, triton.next_power_of_2(size)))


def pieces_of(width: int) -> tuple[int, int]:
    """The largest power of two in a width, and the rest, itself a power of two or 0."""
    largest = 1 << width.bit_length() - 1
    return largest, width - largest


def width_of(size: int) -> int:
    """The least number that holds ``size`` and is one or two powers of two, each 16 or more."""
    largest, rest = pieces_of(max(16, size))
    return largest + (max(16, triton.next_power_of_2(rest)) if rest else 0)


def even_width(size: int, most: int) -> int:
    """The width of tiles along ``size`` that share it evenly, each ``most`` or less."""
    return width_of(even_step(size, most))


def applies(row: MixRow | ProjectRow, arch: int, kind: str, channels_last: bool) -> bool:
    """Whether a row is for this chip, kind and layout."""
    return (
        row.kind == kind and row.arch in (arch, None) and row.channels_last in (channels_last, None)
    )


def fills(size: int, tile: int) -> bool:
    """Whether an axis needs a tile this large."""
    return triton.next_power_of_2(size) >= tile


def has_long_axis(height: int, width: int) -> bool:
    """Whether the projection along H is a launch of its own, before that of ``mix_kernel``."""
    return max(height, width) > LONG


@functools.cache
def mix_config(
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    arch: int,
    precision: str = "ieee",
    channels_last: bool = True,
) -> MixConfig:
    """The tile of ``mix_kernel`` for a block of this size on a chip of compute capability ``arch``.

    Args:
        height: H, 1 to 256.
        width: W, 1 to 256.
        channels: C, 1 to 2048.
        dtype: of the input.
        arch: ten times the compute capability, such as 90.
        precision: of products of float32, "ieee" or "tf32"; of no effect on other types.
        channels_last: whether channels are contiguous in the input.
    """
    kind = kind_of(dtype, precision)
    table = LONG_MIX_TABLE if has_long_axis(height, width) else MIX_TABLE
    rows = [
        row
        for row in table
        if applies(row, arch, kind, channels_last) and max(height, width) <= row.size
    ]
    # a large tile pays, and fits, only where images fill it
    filled = (row for row in rows if fills(height, row.tile_h) and fills(width, row.tile_w))
    row = next(filled, rows[-1])
    tile_h = min(row.tile_h, triton.next_power_of_2(height))
    tile_w = min(row.tile_w, triton.next_power_of_2(width))
    return MixConfig(
        images=row.images * row.tile_h * row.tile_w // (tile_h * tile_w),
        tile_h=tile_h,
        tile_w=tile_w,
        step_h=even_step(height, tile_h),
        step_w=even_step(width, tile_w),
        block_c=row.block_c,
        block_n=even_width(channels, row.block_n),
        block_h=block_of(height, row.block_k),
        block_w=block_of(width, row.block_k),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )


@functools.cache
def project_config(
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    arch: int,
    precision: str = "ieee",
    channels_last: bool = True,
) -> ProjectConfig:
    """The tile of ``project_h_kernel``; arguments as for :func:`mix_config`."""
    kind = kind_of(dtype, precision)
    rows = (row for row in PROJECT_TABLE if applies(row, arch, kind, channels_last))
    config = next(rows).config
    return dataclasses.replace(
        config,
        block_h=block_of(height, config.block_h),
        block_lines=block_of(width * channels, config.block_lines),
        block_k=block_of(height, config.block_k),
    )
