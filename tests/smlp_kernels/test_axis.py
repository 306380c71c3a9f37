"""The tiles of the axis kernels: each holds its axis, nothing depends on the batch."""

import inspect

import pytest
import torch

from smlp_kernels.functional import DTYPES, MAX_CHANNELS, MAX_SIZE
from smlp_kernels.kernels.axis import FORWARD, Needed, split_batch
from smlp_kernels.kernels.narrow import narrow_plans
from smlp_kernels.kernels.rows import copy_images_plan
from smlp_kernels.kernels.tiles import axis_row
from smlp_kernels.kernels.weight_sums import weight_sums_plan
from smlp_kernels.launch import Plan
from tools.aot_report import OTHERS, STAGES

ARCHS = (0, 80, 86, 89, 90, 100, 120)  # 0: the interpreter
EXTREMES = [(1, 1, 1), (MAX_SIZE, 1, MAX_CHANNELS), (1, MAX_SIZE, 2), (MAX_SIZE, MAX_SIZE, 17)]


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", STAGES + OTHERS + EXTREMES, ids=str)
def test_tiles_are_valid(shape: tuple[int, int, int], dtype: torch.dtype, forward: bool) -> None:
    height, width, _ = shape
    for arch in ARCHS:
        for size in (height, width):
            row = axis_row(size, dtype, arch, forward)
            longest = {2: 128, 4: 64, 8: 64 if forward else 32}[dtype.itemsize]
            assert (row is None) == (size > longest)
            if row is not None:
                assert is_power_of_two(row.positions) and row.positions >= max(size, 16)
                assert is_power_of_two(row.columns) and row.columns >= 16


def test_programs_share_the_tiles_evenly() -> None:
    shape = torch.Size((21, 80, 56, 56))
    images, axes = split_batch(shape, FORWARD, (0, 0), torch.bfloat16, "ieee", 90)
    tile = axes.tiles[0]
    assert images == 21 and tile.columns == 64
    tiles = 21 * 56 * 80 / 64
    assert axes.programs[0] == -(-tiles // 3) <= tile.programs < tiles / 2  # three each at most


def test_tiles_do_not_depend_on_the_batch() -> None:
    assert not {"batch", "images"} & set(inspect.signature(axis_row).parameters)


def test_constants_are_in_the_order_of_the_kernels() -> None:
    """A direct launch passes them by position."""
    size, shape = (8, 5, 6), torch.Size((2, 8, 5, 6))

    def axes_plans(needed: Needed) -> tuple[Plan | bool, ...]:
        images, axes = split_batch(shape, needed, (0, 0), torch.float32, "ieee", 80)
        return axes.plans(images, first=True)

    for plan in (
        *axes_plans(FORWARD),
        *axes_plans(Needed(True, True, True, True)),
        copy_images_plan(shape, (240, 30, 6, 1), (240, 1, 48, 8)),
        weight_sums_plan(size, (2, 2), (1, 8, 32), 1),
        *narrow_plans(shape, backward=True),
    ):
        names = plan.kernel.arg_names
        assert names[-len(plan.constants) :] == list(plan.constants)
