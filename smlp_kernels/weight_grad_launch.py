"""What the weight-gradient kernels are called with, from which tiles, and their partial sums."""

from typing import Any

import torch
from torch import Tensor

from smlp_kernels.configs import LineTile, WeightGradConfig, pieces_of, weight_grad_config
from smlp_kernels.kernels.weight_grad import fuse_grad_kernel, proj_grad_kernel
from smlp_kernels.launch import (
    Call,
    Plan,
    any_index_64,
    dense,
    fuse_strides,
    input_precision,
)


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
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Call]]:
    """Partial sums of the gradients of proj_h, proj_w and fuse, and the calls that write them."""
    batch, channels, height, width = x.shape
    weights = [weight.to(x.dtype) for weight in (proj_h, proj_w, fuse)]
    bias_h, bias_w = both_biases(bias_h, bias_w, x)
    config = config or weight_grad_config(
        channels,
        x.dtype,
        arch,
        input_precision(x.dtype),
        channels_last=x.stride(1) == 1 and dy.stride(1) == 1,
    )

    def partial(splits: int, tile: LineTile, size: int) -> Tensor:
        # more partial results than there are tiles to share out would be empty
        tiles = tile.tiles(batch, height, width) if x.numel() else 0
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty((min(splits, tiles), size), dtype=dtype)

    proj_tile, fuse_tile = config.proj_tile(height, width), config.fuse_tile(height, width)
    size_h = height * (height + 1) if need_proj_h else 0
    size_w = width * (width + 1) if need_proj_w else 0
    size_fuse = channels * (3 * channels + 1) if need_fuse else 0
    partial_h = partial(config.proj_splits, proj_tile, size_h)
    partial_w = partial(config.proj_splits, proj_tile, size_w)
    partial_fuse = partial(config.fuse_splits(channels), fuse_tile, size_fuse)
    calls = []
    if x.numel() and (need_proj_h or need_proj_w):
        calls.append(proj_grad_call(config, dy, x, weights[2], partial_h, partial_w))
    if x.numel() and need_fuse:
        calls.append(
            fuse_grad_call(config, dy, x, weights[0], bias_h, weights[1], bias_w, partial_fuse)
        )
    return (partial_h, partial_w, partial_fuse), calls


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


def proj_grad_call(
    config: WeightGradConfig,
    dy: Tensor,
    x: Tensor,
    fuse: Tensor,
    partial_h: Tensor,
    partial_w: Tensor,
) -> Call:
    """The call of ``proj_grad_kernel``; a partial result of no columns is not computed."""
    batch, _, height, width = x.shape
    splits = partial_h.shape[0]
    blocks_h, blocks_w = config.proj_blocks(height, width)
    programs_h = splits * blocks_h if partial_h.shape[1] else 0
    programs_w = splits * blocks_w if partial_w.shape[1] else 0
    plan = Plan(
        proj_grad_kernel,
        programs_h + programs_w,
        (splits, programs_h, batch, *dy.stride(), *x.stride(), *fuse_strides(fuse)),
        {
            **weight_grad_constants(config.proj_tile(height, width), dy, x),
            "BLOCK_O": config.proj_block_o,
            "BLOCK_C": config.proj_block_c,
        },
        config.num_warps,
        config.num_stages,
    )
    return Call(plan, (dy, x, fuse, partial_h, partial_w))


def fuse_grad_call(
    config: WeightGradConfig,
    dy: Tensor,
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    partial: Tensor,
) -> Call:
    """The call of ``fuse_grad_kernel``."""
    batch, channels, height, width = x.shape
    splits = partial.shape[0]
    block_c, rest_c = pieces_of(config.fuse_block_c)
    plan = Plan(
        fuse_grad_kernel,
        3 * splits * config.fuse_tiles(channels),
        (splits, batch, *dy.stride(), *x.stride(), *proj_h.stride(), *proj_w.stride()),
        {
            **weight_grad_constants(config.fuse_tile(height, width), dy, x),
            "BLOCK_O": config.fuse_block_o,
            "BLOCK_C": block_c,
            "REST_C": rest_c,
            "HAS_BIAS": bias_h is not None,
            "CHANNELS_LAST": x.stride(1) == 1,
        },
        config.num_warps,
        config.num_stages,
    )
    return Call(plan, (dy, x, proj_h, bias_h, proj_w, bias_w, partial))


def weight_grad_constants(tile: LineTile, dy: Tensor, x: Tensor) -> dict[str, Any]:
    """Constants that both weight-gradient kernels take."""
    _, channels, height, width = x.shape
    return {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "LINES": tile.lines,
        "POSITIONS": tile.positions,
        "INDEX_64": any_index_64(x.shape, 1, x.stride(), dy.stride()),
        "PRECISION": input_precision(x.dtype),
    }
