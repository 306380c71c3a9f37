"""Counts of bytes and operations against ones made by hand on shapes small enough for that."""

import pytest

from benchmarks.shapes import BY_NAME, Shape
from benchmarks.traffic import (
    Work,
    fuse_grad_work,
    mix_work,
    product,
    proj_grad_work,
    project_work,
    sector_factor,
    sums_work,
)
from smlp_kernels.configs import MixConfig, ProjectConfig, WeightGradConfig

# two images of 8x8 pixels and 32 channels, one tile each, two blocks of input channels
SHAPE = Shape("small", 2, 32, 8, 8)
ONE_TILE = MixConfig(1, 8, 8, 8, 8, 16, 32, 16, 16, 4, 2)
ELEMENTS = 2 * 32 * 8 * 8

LINES = Shape("lines", 1, 16, 4, 4)
GRAD = WeightGradConfig(64, 16, 16, 64, 16, 16, 4, 2)


def test_mix_of_one_tile_per_image() -> None:
    work = mix_work(SHAPE, "bf16", ONE_TILE)
    # weights and biases: 8*8 + 8 twice, 32*96 + 32
    assert work.dram == 2 * (2 * ELEMENTS + 72 + 72 + 3104)
    # per image x is read as tile, columns and rows, and all of the channel weights; y is written
    assert work.l2 == 2 * (3 * ELEMENTS + 2 * 3 * 32 * 32 + ELEMENTS)
    # four (image, channel block) steps; 8 rows of a projection are padded to 16, its 8 columns too
    assert work.mma == 4 * 2 * (2 * 16 * 128 * 16)
    assert work.wgmma == 4 * (2 * 64 * 32 * 48)
    # a step: columns and rows [16, 128], x [64, 16], weights [48, 32], x_h and x_w [64, 16] moved
    # once more; then y [64, 32] of each image
    step = 2 * 2 * (16 * 128 + 16 * 128 + 64 * 16 + 48 * 32 + 2 * 64 * 16)
    assert work.shared == 4 * step + 2 * (2 * 2 * 64 * 32)


def test_a_tile_of_whole_images_is_read_once() -> None:
    shape = Shape("square", 2, 32, 14, 16)
    work = mix_work(shape, "bf16", MixConfig(1, 16, 16, 14, 16, 16, 32, 16, 16, 8, 2))
    assert work.l2 == 2 * (2 * shape.elements + 2 * 3 * 32 * 32)
    # four steps: x [256, 16] and weights [48, 32] are copied and read, x is read by both mixes as
    # well, x_h and x_w moved once more; then y [256, 32] of each image
    step = 2 * (2 * (256 * 16 + 48 * 32) + 2 * 256 * 16 + 2 * 2 * 256 * 16)
    assert work.shared == 4 * step + 2 * (2 * 2 * 256 * 32)


# 32 channels, one image of 4 x 128: a long axis
LONG = Shape("long", 1, 32, 4, 128)


def test_a_projection_of_one_tile_of_rows() -> None:
    work = project_work(LONG, "bf16", ProjectConfig(16, 128, 16, 4, 2))
    # x once, x_h once, the 4 x 4 weights
    assert work.dram == 2 * (2 * LONG.elements + 16)
    # 32 programs of 128 of the 4096 columns, which read the projection's 4 columns of 16 each
    assert work.l2 == 2 * (2 * LONG.elements + 32 * 4 * 16)
    assert work.mma == 32 * 2 * (16 * 128 * 16) and work.wgmma == 0
    # copied and read once: projection [16, 16] and columns [16, 128]; then x_h [16, 128]
    assert work.shared == 32 * 2 * 2 * (16 * 16 + 16 * 128 + 16 * 128)


def test_columns_are_read_again_for_every_tile_of_output_rows() -> None:
    tall = Shape("tall", 1, 32, 128, 4)
    one, four = (project_work(tall, "bf16", ProjectConfig(b, 128, 64, 8, 3)) for b in (128, 32))
    assert four.dram == one.dram
    assert four.l2 - one.l2 == 2 * 3 * tall.elements


def test_a_tile_of_an_image_with_a_long_axis_reads_no_columns() -> None:
    config = MixConfig(1, 2, 128, 2, 128, 16, 32, 16, 64, 8, 2)
    work = mix_work(LONG, "bf16", config)
    weights = 4 * 4 + 4 + 128 * 128 + 128 + 32 * 96 + 32
    assert work.dram == 2 * (3 * LONG.elements + weights)
    # x as tile and as rows, x_h, y; two tiles read the channel weights
    assert work.l2 == 2 * (4 * LONG.elements + 2 * 3 * 32 * 32)
    # four (tile, channel block) steps: rows [128, 2 * 16] mixed by 128 x 128, then 3 * 16 channels
    assert work.wgmma == 4 * 2 * (128 * 32 * 128 + 256 * 32 * 48) and work.mma == 0


def test_more_tiles_read_more_from_l2_and_nothing_more_from_dram() -> None:
    halves = MixConfig(1, 4, 8, 4, 8, 16, 16, 16, 16, 4, 2)  # two row tiles, two channel tiles
    work, whole = mix_work(SHAPE, "bf16", halves), mix_work(SHAPE, "bf16", ONE_TILE)
    assert work.dram == whole.dram
    # for both channel tiles: tile once, columns for both row tiles, rows once; weights per tile
    assert work.l2 == 2 * (2 * 4 * ELEMENTS + 4 * 3 * 32 * 32 + ELEMENTS)


def test_a_tile_that_is_not_filled_costs_operations_and_no_bytes() -> None:
    narrow = Shape("narrow", 2, 32, 8, 7)
    work = mix_work(narrow, "bf16", MixConfig(1, 8, 8, 8, 7, 16, 32, 16, 16, 4, 2))
    full = mix_work(SHAPE, "bf16", ONE_TILE)
    assert (work.wgmma, work.mma) == (full.wgmma, full.mma)
    assert work.l2 - 2 * 2 * 3 * 32 * 32 == (full.l2 - 2 * 2 * 3 * 32 * 32) * 7 / 8


@pytest.mark.parametrize(
    ("run", "pitch", "size", "factor"),
    [
        (32, 64, 2, 1.0),
        (16, 32, 2, 2.0),  # half of each sector is thrown away
        (32, 48, 2, (32 + 30) / 32),  # may start at any element: 30 bytes more on average
        (6, 6, 2, (6 + 30) / 6),
    ],
)
def test_whole_sectors(run: int, pitch: int, size: int, factor: float) -> None:
    assert sector_factor(run, pitch, size) == pytest.approx(factor)


def test_nchw_pays_for_short_runs_of_the_tile_and_not_for_whole_rows() -> None:
    shape = Shape("wide", 2, 32, 8, 16)
    config = MixConfig(1, 8, 8, 8, 8, 16, 32, 16, 16, 4, 2)  # runs of 8 bf16 are half a sector
    extra = (
        mix_work(shape, "bf16", config, "nchw").l2
        - mix_work(shape, "bf16", config, "channels_last").l2
    )
    assert extra == 2 * 3 * shape.elements  # tile, columns and y once more each; two row tiles: no
    with pytest.raises(ValueError, match=r"layout: expected one of channels_last.*got 'tiled'"):
        mix_work(shape, "bf16", config, "tiled")


def test_small_products_are_padded_to_the_instruction() -> None:
    assert product(64, 8, 16) == Work(wgmma=2 * 64 * 8 * 16)
    assert product(20, 8, 16).mma == 2 * 32 * 8 * 16
    assert product(20, 8, 16).instructions == 2  # m16n8k16 twice


def test_projection_gradients_of_one_tile() -> None:
    work = proj_grad_work(LINES, "bf16", GRAD)
    elements = 16 * 16
    # per axis dy, x and F once, and one partial result of 4*4 + 4 written in float32
    assert work.l2 == 2 * (2 * (2 * elements + 16 * 16) + 4 * 20)
    assert work.wgmma == 2 * (2 * 64 * 16 * 16 + 2 * 64 * 64 * 16)
    assert work.mma == 0


def test_an_axis_of_two_blocks_takes_four_times_the_work() -> None:
    long, short = Shape("long", 1, 16, 128, 64), Shape("short", 2, 16, 64, 64)
    w_axis = proj_grad_work(short, "bf16", GRAD).wgmma / 2
    # along h in two blocks of 64: four pairs of as many lines as an image has columns, 64
    assert proj_grad_work(long, "bf16", GRAD).wgmma == 4 * w_axis / 2 + w_axis


def test_fuse_gradient_of_one_tile() -> None:
    work = fuse_grad_work(LINES, "bf16", GRAD)  # 8 lines of 4 positions: room for 8, of which 4 are
    elements, projection = 16 * 16, 4 * 4
    assert work.l2 == 2 * (3 * 2 * elements + 2 * projection) + 4 * (16 * 49)
    assert work.wgmma == 0
    # dy' @ branch, 16 output channels; 4 positions of the two mixes of x are padded to 16 twice
    assert work.mma == 3 * (2 * 16 * 16 * 32) + 2 * (2 * 16 * (8 * 16) * 16)


def test_fuse_gradient_reads_x_for_every_block_of_output_channels() -> None:
    shape = Shape("two", 1, 32, 64, 64)
    one, two = (WeightGradConfig(64, 16, 16, 64, o, 32, 4, 2, fuse_programs=3) for o in (32, 16))
    difference = fuse_grad_work(shape, "bf16", two).l2 - fuse_grad_work(shape, "bf16", one).l2
    # x once more, mixed by one more copy of the projection for each of 64 lines on both axes
    assert difference == 2 * (3 * shape.elements + 2 * 64 * 64 * 64)


def test_partial_results_stop_at_the_configured_number() -> None:
    shape = BY_NAME["small-14"]
    fewer = WeightGradConfig(64, 16, 16, 64, 16, 16, 4, 2, proj_splits=2)
    more = WeightGradConfig(64, 16, 16, 64, 16, 16, 4, 2, proj_splits=4)
    difference = (
        proj_grad_work(shape, "bf16", more).dram - proj_grad_work(shape, "bf16", fewer).dram
    )
    assert difference == 2 * 2 * 4 * (14 * 15)  # two more, both axes


def test_sums_read_what_the_kernels_wrote() -> None:
    sizes = [4 * 5, 4 * 5, 16 * 49]  # a partial result each: one tile of lines
    assert sums_work(LINES, "bf16", GRAD) == Work(dram=6 * sum(sizes), l2=6 * sum(sizes))
    shape = BY_NAME["small-14"]
    config = WeightGradConfig(64, 16, 16, 64, 128, 192, 4, 2, proj_splits=3, fuse_programs=2 * 18)
    read = 4 * (3 * 2 * 14 * 15 + 2 * 384 * 1153)  # two sums of six tiles of dF for each branch
    assert sums_work(shape, "bf16", config).l2 == read + 2 * (2 * 14 * 15 + 384 * 1153)


@pytest.mark.parametrize(
    ("name", "config", "in_the_loop"),
    [
        ("small-14", MixConfig(1, 8, 8, 7, 7, 16, 64, 16, 16, 4, 2), 157),
        ("small-56", MixConfig(1, 8, 8, 8, 8, 16, 64, 64, 64, 4, 2), 317),
        ("small-7", MixConfig(1, 8, 8, 7, 7, 16, 64, 16, 16, 4, 2), 149),
    ],
)
def test_instructions_of_a_step_are_those_of_the_compiled_loop(
    name: str, config: MixConfig, in_the_loop: int
) -> None:
    def of_a_program(channels: int) -> float:
        shape = Shape("one", 1, channels, BY_NAME[name].height, BY_NAME[name].width)
        return mix_work(shape, "bf16", config).instructions / config.programs(
            1, shape.height, shape.width, channels
        )

    # two blocks of input channels beyond the first two, by four warps
    step = (of_a_program(64) - of_a_program(32)) / 2 / 4
    assert step == pytest.approx(in_the_loop, rel=0.06)
