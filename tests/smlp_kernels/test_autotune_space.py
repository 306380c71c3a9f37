"""The tiles that a search may take: few, valid, and every one of them right."""

import dataclasses
from typing import Any

import pytest
import torch

from smlp.functional import smlp
from smlp_kernels import autotune_space, mix_launch, weight_grad_launch
from smlp_kernels.autotune import MIX, WEIGHT_GRAD, Search
from smlp_kernels.autotune_space import Chip, Problem
from smlp_kernels.configs import MixConfig, width_of
from tests.smlp_kernels.oracle import EPS, NAMES, Case, assert_close, formula, to_float64

HOPPER = Chip("NVIDIA H100 80GB HBM3", 90, 227 * 1024)
CHIP = Chip("interpreter", 0, 99 * 1024)
CASE = Case(3, 3, 5, 18)  # small: every tile is run
PROBLEM = Problem(3, 5, 18, torch.float32, "ieee", True)
BOTH = pytest.mark.parametrize("kernels", [MIX, WEIGHT_GRAD], ids=["mix", "weight_grad"])


def space_of(kernels: Search, problem: Problem, chip: Chip) -> list[Any]:
    """All that a search can come to time: the shipped row, its neighbours and theirs.

    Warps and stages are left out: they are nothing to the interpreter.
    """
    shipped = kernels.shipped(problem, chip)
    near = kernels.neighbours(shipped, problem, chip)
    further = (c for config in near for c in kernels.neighbours(config, problem, chip))
    every = [shipped, *near, *further]
    return list(dict.fromkeys(dataclasses.replace(c, num_warps=8, num_stages=2) for c in every))


@BOTH
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(56, 56, 96), (7, 7, 768), (1, 1, 1), (256, 9, 2048)], ids=str)
def test_space_is_small_and_valid(
    size: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, kernels: Search
) -> None:
    problem = Problem(*size, dtype, "ieee", channels_last)
    shipped = kernels.shipped(problem, HOPPER)
    near = kernels.neighbours(shipped, problem, HOPPER)
    assert shipped not in near
    assert len(near) == len(set(near)) <= 20
    for config in near:
        for name, value in dataclasses.asdict(config).items():
            free = ("step_h", "step_w", "num_stages", "proj_splits", "fuse_programs")
            if name in ("block_n", "fuse_block_c"):
                assert value == width_of(value), name
            else:
                assert name in free or (value > 0 and value & (value - 1) == 0), name
            assert "block" not in name or value >= 16, name
        if kernels is MIX:
            pixels = config.images * config.tile_h * config.tile_w
            words = 2 if dtype == torch.float64 else 1
            assert pixels >= 16
            assert words * pixels * config.block_n <= 192 * 32 * config.num_warps
            assert config.step_h <= config.tile_h and config.step_w <= config.tile_w


@BOTH
def test_shared_memory_prunes(kernels: Search) -> None:
    problem = Problem(56, 56, 96, torch.bfloat16, "ieee", True)
    small = dataclasses.replace(HOPPER, shared_memory=40 * 1024)
    shipped = kernels.shipped(problem, HOPPER)
    assert set(kernels.neighbours(shipped, problem, small)) < set(
        kernels.neighbours(shipped, problem, HOPPER)
    )


def test_every_mix_tile_is_right() -> None:
    arguments = CASE.arguments(torch.float32)
    exact = formula(*to_float64(arguments))
    peer = smlp(*arguments)
    y = torch.empty_like(arguments[0])
    for config in space_of(MIX, PROBLEM, CHIP):
        y.fill_(torch.nan)
        (call,) = mix_launch.mix_calls(*arguments, y, False, CHIP.arch, config)
        call.launch(y)
        assert_close(y, exact, peer, eps=EPS[torch.float32], name=str(config))


def test_every_weight_gradient_tile_is_right() -> None:
    arguments = CASE.arguments(torch.float32)
    weights = [a.requires_grad_() for a in to_float64(arguments)[1:]]
    dy = CASE.arguments(torch.float32, seed=1)[0]
    x, proj_h, bias_h, proj_w, bias_w, fuse, _ = arguments
    formula(x.double(), *weights).backward(dy.double())
    for config in space_of(WEIGHT_GRAD, PROBLEM, CHIP):
        grads, calls = weight_grad_launch.weight_grad_calls(
            dy, x, proj_h, bias_h, proj_w, bias_w, fuse, True, True, True, CHIP.arch, config
        )
        for call in calls:
            call.launch(x)
        for name, grad, weight in zip(NAMES[1:], grads, weights, strict=True):
            assert_close(
                grad, weight.grad, None, eps=EPS[torch.float32],
                name=f"{name} of {config}", reduction=CASE.reduction(name),
            )  # fmt: skip


def test_problem_holds_no_batch() -> None:
    assert "batch" not in {field.name for field in dataclasses.fields(autotune_space.Problem)}


# 128 pixels by 128 channels on 4 warps: 128 accumulators a thread, of 192 that there may be
TILE = MixConfig(
    images=2, tile_h=8, tile_w=8, step_h=7, step_w=7,
    block_c=16, block_n=128, block_h=16, block_w=16, num_warps=4, num_stages=2,
)  # fmt: skip
FOURTEEN = Problem(14, 14, 384, torch.float32, "ieee", True)


def fits(problem: Problem = FOURTEEN, **change: int) -> bool:
    return autotune_space.mix_fits(dataclasses.replace(TILE, **change), problem, HOPPER)


def test_what_fits() -> None:
    assert fits()
    assert fits(block_n=192)
    assert not fits(block_n=256)  # 256 accumulators a thread
    assert not fits(block_n=112)  # three powers of two
    assert not fits(dataclasses.replace(FOURTEEN, dtype=torch.float64))  # of two registers each
    assert fits(images=1, tile_h=2, step_h=2)
    assert not fits(images=1, tile_h=1, step_h=1)  # 8 pixels
    assert not fits(step_h=8)  # 14 rows take two tiles of 7
    assert not fits(tile_h=32, tile_w=1, step_h=14, step_w=1)  # half of the rows are empty
    assert not fits(num_warps=16) and not fits(num_stages=0)


def test_neighbours_change_the_steps_with_the_tile() -> None:
    near = autotune_space.mix_neighbours(TILE, FOURTEEN, HOPPER)
    steps = {(config.tile_h, config.step_h) for config in near}
    assert {(4, 4), (8, 7), (16, 14)} <= steps
