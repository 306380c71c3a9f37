"""What the forward kernels are called with, from which tiles."""

import functools

import torch
from torch import Tensor

from smlp_kernels.configs import (
    MixConfig,
    ProjectConfig,
    has_long_axis,
    mix_config,
    pieces_of,
    project_config,
)
from smlp_kernels.kernels.mix import mix_kernel
from smlp_kernels.kernels.project import project_h_kernel
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
from smlp_kernels.weights import Weights


def mix_calls(
    x: Tensor, weights: Weights, y: Tensor, arch: int, config: MixConfig | None = None
) -> list[Call]:
    """The calls that write ``y``.

    That is one of ``mix_kernel``; where an axis is long, one of ``project_h_kernel`` before it.
    """
    proj_h, proj_w, fuse = in_type_of(x, weights.proj_h, weights.proj_w, weights.fuse)
    bias_h, bias_w, bias = dense(weights.bias_h), dense(weights.bias_w), weights.bias
    precision = input_precision(x.dtype)
    x_h = torch.empty_like(y) if has_long_axis(*x.shape[2:]) else None
    plan = mix_plan(
        x.shape,
        x.stride(),
        y.stride(),
        (*proj_h.stride(), *proj_w.stride(), *fuse_strides(fuse)),
        (bias_h is not None, bias_w is not None),
        None if bias is None else bias.stride(),
        x.dtype,
        precision,
        arch,
        config,
    )
    calls = [Call(plan, (x, x_h, proj_h, bias_h, proj_w, bias_w, fuse, bias, y))]
    if x_h is not None:
        plan = project_h_plan(
            x.shape,
            x.stride(),
            x_h.stride(),
            proj_h.stride(),
            bias_h is not None,
            project_config(*(*x.shape[2:], x.shape[1]), x.dtype, arch, precision, x.stride(1) == 1),
            precision,
        )
        calls.insert(0, Call(plan, (x, proj_h, bias_h, x_h)))
    return calls


@functools.lru_cache(PLANS)
def mix_plan(
    shape: torch.Size,
    x_strides: Strides,
    y_strides: Strides,
    weight_strides: Strides,
    has_bias: tuple[bool, bool],
    bias_strides: Strides | None,
    dtype: torch.dtype,
    precision: str,
    arch: int,
    config: MixConfig | None,
) -> Plan:
    """The plan of ``mix_kernel``; without a ``config`` from the tile for this size and chip."""
    batch, channels, height, width = shape
    channels_last = x_strides[1] == 1
    config = config or mix_config(height, width, channels, dtype, arch, precision, channels_last)
    block_n, rest_n = pieces_of(config.block_n)
    return Plan(
        mix_kernel,
        config.programs(batch, height, width, channels),
        (
            *(batch, *x_strides, *y_strides, *weight_strides),
            *(*(bias_strides or ()), 0, 0, 0)[:3],  # one stride, three, or no bias at all
        ),
        {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "IMAGES": config.images,
            "TILE_H": config.tile_h,
            "TILE_W": config.tile_w,
            "STEP_H": config.step_h,
            "STEP_W": config.step_w,
            "BLOCK_C": config.block_c,
            "BLOCK_N": block_n,
            "REST_N": rest_n,
            "BLOCK_H": config.block_h,
            "BLOCK_W": config.block_w,
            "WHOLE": config.holds_images(height, width),
            "PROJECTED": has_long_axis(height, width),
            "HAS_BIAS_H": has_bias[0],
            "HAS_BIAS_W": has_bias[1],
            "HAS_BIAS": bias_strides is not None,
            "BIAS_MAP": bias_strides is not None and len(bias_strides) == 3,
            "CHANNELS_LAST": channels_last,
            "INDEX_64": any_index_64(shape, config.images, x_strides, y_strides),
            "PRECISION": precision,
        },
        config.num_warps,
        config.num_stages,
    )


@functools.lru_cache(PLANS)
def project_h_plan(
    shape: torch.Size,
    x_strides: Strides,
    y_strides: Strides,
    proj_strides: Strides,
    has_bias: bool,
    config: ProjectConfig,
    precision: str,
) -> Plan:
    """The plan of ``project_h_kernel``; ``proj_strides`` are those of out and in."""
    batch, channels, height, width = shape
    return Plan(
        project_h_kernel,
        config.programs(batch, height, width, channels),
        (*x_strides, *y_strides, *proj_strides),
        {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "BLOCK_H": config.block_h,
            "BLOCK_LINES": config.block_lines,
            "BLOCK_K": config.block_k,
            "HAS_BIAS": has_bias,
            "CHANNELS_LAST": x_strides[1] == 1,
            "INDEX_64": any_index_64(shape, 1, x_strides, y_strides),
            "PRECISION": precision,
        },
        config.num_warps,
        config.num_stages,
    )
