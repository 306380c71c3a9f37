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
    mix_config,
    weight_grad_config,
)

ARCHS = (0, 80, 86, 89, 90, 100, 120)  # 0: the interpreter
EXTREMES = [(1, 1, 1), (MAX_SIZE, 1, MAX_CHANNELS), (1, MAX_SIZE, 2), (MAX_SIZE, MAX_SIZE, 17)]


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STAGES + OTHERS + EXTREMES, ids=str)
def test_tiles_are_valid(shape: tuple[int, int, int], dtype: torch.dtype, precision: str) -> None:
    height, width, channels = shape
    for arch in ARCHS:
        mix = mix_config(height, width, channels, dtype, arch, precision)
        for name, value in dataclasses.asdict(mix).items():
            assert name in ("step_h", "step_w", "num_stages") or is_power_of_two(value), name
        assert 1 <= mix.step_h <= min(mix.tile_h, height)
        assert 1 <= mix.step_w <= min(mix.tile_w, width)
        products = (mix.block_c, mix.block_n, mix.block_h, mix.block_w)
        assert min(products) >= 16  # the least a product on tensor cores takes
        assert mix.images * mix.tile_h * mix.tile_w >= 16

        grad = weight_grad_config(channels, dtype, arch, precision)
        positions, lines = grad.positions(height, width), grad.lines(height, width)
        assert positions * lines == grad.rows
        assert is_power_of_two(positions) and is_power_of_two(lines)


@pytest.mark.parametrize(("size", "tile", "step"), [(14, 8, 7), (56, 16, 14), (7, 8, 7), (9, 8, 5)])
def test_even_step(size: int, tile: int, step: int) -> None:
    assert even_step(size, tile) == step


def test_programs() -> None:
    config = MixConfig(
        images=2, tile_h=8, tile_w=16, step_h=7, step_w=14,
        block_c=16, block_n=64, block_h=16, block_w=16, num_warps=4, num_stages=2,
    )  # fmt: skip
    # 3 pairs of images (the last one half empty), 2 x 1 tiles, 2 blocks of channels
    assert config.programs(batch=5, height=14, width=14, channels=65) == 3 * 2 * 1 * 2


def test_weight_grad_partition() -> None:
    config = weight_grad_config(320, torch.bfloat16, 80)
    # the longer axis, 20, sets 32 positions and so 2 lines a tile, on either axis
    assert (config.positions(20, 5), config.lines(20, 5)) == (32, 2)
    assert config.tiles(batch=3, height=20, width=5) == 3 * 20 / 2
    assert config.proj_blocks(20, 130) == (1, 9)


def test_configurations_do_not_depend_on_the_batch() -> None:
    for function in (mix_config, weight_grad_config):
        assert "batch" not in inspect.signature(function).parameters
