"""The two operators as functions of tensors: allocate, choose the tile, launch."""

import os

import torch
from torch import Tensor

from smlp_kernels import autotune
from smlp_kernels.launch import arch_of, dense
from smlp_kernels.mix_launch import mix_calls
from smlp_kernels.weight_grad_launch import weight_grad_calls

AUTOTUNE = os.environ.get("SMLP_KERNELS_AUTOTUNE") == "1"  # fixed when the kernels are imported


def mix(
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    fuse: Tensor,
    bias: Tensor | None,
    transposed: bool = False,
) -> Tensor:
    """The launches of ``mix_calls``; shapes as in :mod:`smlp_kernels.ops`."""
    y = torch.empty_like(x)
    if x.numel():
        proj_h, proj_w, fuse = proj_h.to(x.dtype), proj_w.to(x.dtype), fuse.to(x.dtype)
        bias_h, bias_w = dense(bias_h), dense(bias_w)
        config = autotune.mix_config_like(x) if AUTOTUNE else None
        weights = (proj_h, bias_h, proj_w, bias_w, fuse, bias)
        for call in mix_calls(x, *weights, y, transposed, arch_of(x), config):
            call.run(x)
    return y


def mix_weight_grad(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """At most one launch of each weight-gradient kernel; shapes as in :mod:`smlp_kernels.ops`."""
    config = autotune.weight_grad_config_like(dy, x) if AUTOTUNE and x.numel() else None
    need = (need_proj_h, need_proj_w, need_fuse)
    (partial_h, partial_w, partial_fuse), calls = weight_grad_calls(
        dy, x, proj_h, bias_h, proj_w, bias_w, fuse, *need, arch_of(x), config
    )
    for call in calls:
        call.run(x)
    return (
        *weight_and_bias(partial_h.sum(0), proj_h),
        *weight_and_bias(partial_w.sum(0), proj_w),
        *weight_and_bias(partial_fuse.sum(0), fuse),
    )


def weight_and_bias(flat: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A flat gradient as those of a weight and its bias; both empty where it is empty."""
    if flat.numel() == 0:
        return flat, flat.clone()
    size = weight.numel()
    # a copy of the bias: a registered operator's outputs must not share memory
    return flat[:size].view(weight.shape), flat[size:].clone()
