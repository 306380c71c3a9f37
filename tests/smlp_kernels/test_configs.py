"""The configuration rule: every tile covers its axis, nothing depends on the batch."""

import dataclasses
import inspect

import pytest
import torch

from smlp_kernels.aot_report import OTHERS, STAGES
from smlp_kernels.configs import (
    DTYPES,
    MAX_CHANNELS,
    MAX_SIZE,
    MixConfig,
    even_step,
    even_width,
    mix_config,
    pieces_of,
    width_of,
)
from smlp_kernels.kernels.axis_grad import axis_tile

ARCHS = (0, 80, 86, 89, 90, 100, 120)  # 0: the interpreter
EXTREMES = [(1, 1, 1), (MAX_SIZE, 1, MAX_CHANNELS), (1, MAX_SIZE, 2), (MAX_SIZE, MAX_SIZE, 17)]


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def is_width(value: int) -> bool:
    """Whether a number is a power of two of 16 or more, or two different ones."""
    powers = [16 << i for i in range(8)]
    return value in powers or value in {a + b for a in powers for b in powers if a != b}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STAGES + OTHERS + EXTREMES, ids=str)
def test_tiles_are_valid(shape: tuple[int, int, int], dtype: torch.dtype, precision: str) -> None:
    height, width, channels = shape
    for arch in ARCHS:
        mix = mix_config(height, width, channels, dtype, arch, precision)
        for name, value in dataclasses.asdict(mix).items():
            free = ("step_h", "step_w", "num_stages", "block_n")
            assert name in free or is_power_of_two(value), name
        assert 1 <= mix.step_h <= min(mix.tile_h, height)
        assert 1 <= mix.step_w <= min(mix.tile_w, width)
        # the least a product on tensor cores takes
        assert min(mix.block_c, mix.block_h, mix.block_w) >= 16
        assert is_width(mix.block_n)
        assert mix.images * mix.tile_h * mix.tile_w >= 16

        for size in (height, width):
            tile = axis_tile(size, channels, dtype, arch)
            longest = 128 if dtype.itemsize == 2 else 64
            assert (tile is None) == (size > longest)
            if tile is not None:
                assert is_power_of_two(tile.positions) and tile.positions >= max(size, 16)
                assert is_power_of_two(tile.lines) and is_power_of_two(tile.block_c)
                assert tile.block_c >= 16


@pytest.mark.parametrize(("size", "tile", "step"), [(14, 8, 7), (56, 16, 14), (7, 8, 7), (9, 8, 5)])
def test_even_step(size: int, tile: int, step: int) -> None:
    assert even_step(size, tile) == step


def test_a_width_is_the_least_that_holds_a_size() -> None:
    for size in range(1, MAX_CHANNELS):
        width = width_of(size)
        assert width >= size and not any(map(is_width, range(size, width)))
        large, rest = pieces_of(width)
        assert large + rest == width and is_power_of_two(large)
        assert rest == 0 or (is_power_of_two(rest) and 16 <= rest < large)


@pytest.mark.parametrize(
    ("size", "most", "width"), [(320, 192, 160), (384, 192, 192), (448, 160, 160), (112, 128, 128)]
)
def test_even_width(size: int, most: int, width: int) -> None:
    assert even_width(size, most) == width


def test_programs() -> None:
    config = MixConfig(
        images=2, tile_h=8, tile_w=16, step_h=7, step_w=14,
        block_c=16, block_n=64, block_h=16, block_w=16, num_warps=4, num_stages=2,
    )  # fmt: skip
    # 3 pairs of images (the last one half empty), 2 x 1 tiles, 2 blocks of channels
    assert config.programs(batch=5, height=14, width=14, channels=65) == 3 * 2 * 1 * 2


def test_configurations_do_not_depend_on_the_batch() -> None:
    for function in (mix_config, axis_tile):
        assert "batch" not in inspect.signature(function).parameters
