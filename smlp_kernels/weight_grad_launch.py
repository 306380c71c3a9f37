"""What the weight-gradient kernels are called with: tiles, partial results and their sums."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from smlp_kernels.configs import LineTile, WeightGradConfig, pieces_of, weight_grad_config
from smlp_kernels.kernels.partial_sums import partial_sums_kernel
from smlp_kernels.kernels.weight_grad import fuse_grad_kernel, proj_grad_kernel
from smlp_kernels.launch import (
    PLANS,
    Call,
    Plan,
    Strides,
    any_index_64,
    dense,
    fuse_strides,
    in_type_of,
    input_precision,
)

SUM_TILE = 1024  # elements that a program of partial_sums_kernel adds at a time: 8 a thread
SUM_ROWS = 32  # partial results of them at most
SUM_WARPS = 4

Grads = tuple[Tensor, ...]
Needed = tuple[bool, bool, bool]  # the gradients of proj_h, proj_w and fuse, each with its bias'


def weight_grad_calls(
    dy: Tensor,
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    fuse: Tensor,
    need_proj_h: bool,
    need_proj_w: bool,
    need_fuse: bool,
    arch: int,
    config: WeightGradConfig | None = None,
) -> tuple[Grads, list[Call]]:
    """The gradients, to be filled, and the calls that fill them: partial results, then sums."""
    needed = (need_proj_h, need_proj_w, need_fuse)
    grads = empty_grads(x, (proj_h, proj_w, fuse), needed)
    if not any(needed):
        return grads, []
    bias_h, bias_w = both_biases(bias_h, bias_w, x)
    proj_h, proj_w, fuse = in_type_of(x, proj_h, proj_w, fuse)
    plans = weight_grad_plans(
        x.shape,
        dy.stride(),
        x.stride(),
        (*proj_h.stride(), *proj_w.stride(), *fuse_strides(fuse)),
        bias_h is not None,
        needed,
        x.dtype,
        input_precision(x.dtype),
        arch,
        config,
    )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial_h, partial_w, partial_fuse = (x.new_empty(p, dtype=dtype) for p in plans.partials)
    calls = []
    if plans.proj is not None:
        calls.append(Call(plans.proj, (dy, x, fuse, partial_h, partial_w)))
    if plans.fuse is not None:
        calls.append(Call(plans.fuse, (dy, x, proj_h, bias_h, proj_w, bias_w, partial_fuse)))
    calls.append(Call(plans.sums, (partial_h, partial_w, partial_fuse, *grads)))
    return grads, calls


def empty_grads(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], needed: Needed) -> Grads:
    """Tensors for the gradients of three weights and their biases; empty where not needed."""
    grads: list[Tensor] = []
    for weight, wanted in zip(weights, needed, strict=True):
        grads.append(x.new_empty(weight.shape if wanted else 0, dtype=weight.dtype))
        grads.append(x.new_empty(weight.shape[0] if wanted else 0, dtype=weight.dtype))
    return tuple(grads)


def both_biases(
    bias_h: Tensor | None, bias_w: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Both biases dense and of one type, or neither: one body of the kernel serves both axes."""
    given = bias_w if bias_h is None else bias_h
    if given is None:
        return None, None
    bias_h = given.new_zeros(x.shape[2]) if bias_h is None else bias_h
    bias_w = given.new_zeros(x.shape[3]) if bias_w is None else bias_w
    return dense(bias_h), dense(bias_w.to(bias_h.dtype))


class WeightGradPlans(NamedTuple):
    """The launches for the gradients of the weights, None where one is not needed."""

    partials: tuple[tuple[int, int], ...]  # shapes of the partial results: how many, of what size
    proj: Plan | None
    fuse: Plan | None
    sums: Plan


@functools.lru_cache(PLANS)
def weight_grad_plans(
    shape: torch.Size,
    dy_strides: Strides,
    x_strides: Strides,
    weight_strides: Strides,
    has_bias: bool,
    needed: Needed,
    dtype: torch.dtype,
    precision: str,
    arch: int,
    config: WeightGradConfig | None,
) -> WeightGradPlans:
    """The plans; without a ``config`` from the tiles for this size and chip."""
    batch, channels, height, width = shape
    channels_last = x_strides[1] == 1 and dy_strides[1] == 1
    config = config or weight_grad_config(channels, dtype, arch, precision, channels_last)
    proj_tile, fuse_tile = config.proj_tile(height, width), config.fuse_tile(height, width)

    def constants(tile: LineTile) -> dict[str, Any]:
        return {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "LINES": tile.lines,
            "POSITIONS": tile.positions,
            "INDEX_64": any_index_64(shape, 1, x_strides, dy_strides),
            "PRECISION": precision,
        }

    need_proj_h, need_proj_w, need_fuse = needed
    results = config.partial_results(batch, height, width, channels)
    partials = tuple(
        (splits, size if wanted else 0)
        for (splits, size), wanted in zip(results, needed, strict=True)
    )
    (proj_splits, _), _, (fuse_splits, _) = partials
    proj = fuse = None
    if batch and (need_proj_h or need_proj_w):
        blocks_h, blocks_w = config.proj_blocks(height, width)
        programs_h = proj_splits * blocks_h if need_proj_h else 0
        programs_w = proj_splits * blocks_w if need_proj_w else 0
        proj = Plan(
            proj_grad_kernel,
            programs_h + programs_w,
            (proj_splits, programs_h, batch, *dy_strides, *x_strides, *weight_strides[4:]),
            {
                **constants(proj_tile),
                "BLOCK_O": config.proj_block_o,
                "BLOCK_C": config.proj_block_c,
            },
            config.num_warps,
            config.num_stages,
        )
    if batch and need_fuse:
        block_c, rest_c = pieces_of(config.fuse_block_c)
        fuse = Plan(
            fuse_grad_kernel,
            3 * fuse_splits * config.fuse_tiles(channels),
            (fuse_splits, batch, *dy_strides, *x_strides, *weight_strides[:4]),
            {
                **constants(fuse_tile),
                "BLOCK_O": config.fuse_block_o,
                "BLOCK_C": block_c,
                "REST_C": rest_c,
                "HAS_BIAS": has_bias,
                "CHANNELS_LAST": x_strides[1] == 1,
            },
            config.num_warps,
            config.num_stages,
        )
    most = (config.proj_splits, config.fuse_splits(channels))  # of any batch
    rows_proj, rows_fuse = (min(SUM_ROWS, pieces_of(count)[0]) for count in most)
    programs = [
        triton.cdiv(size, SUM_TILE // rows)
        for (_, size), rows in zip(partials, (rows_proj, rows_proj, rows_fuse), strict=True)
    ]
    sums = Plan(
        partial_sums_kernel,
        sum(programs),
        (proj_splits, fuse_splits, *programs[:2]),
        {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "ROWS_PROJ": rows_proj,
            "ROWS_FUSE": rows_fuse,
            "TILE": SUM_TILE,
        },
        SUM_WARPS,
        1,
    )
    return WeightGradPlans(partials, proj, fuse, sums)
