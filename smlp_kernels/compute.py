"""The two operators as functions of tensors: allocate, choose the tile, launch."""

import os

import torch
from torch import Tensor

from smlp_kernels import autotune
from smlp_kernels.launch import arch_of
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
) -> tuple[Tensor, ...]:
    """The launches of ``weight_grad_calls``; shapes as in :mod:`smlp_kernels.ops`."""
    config = autotune.weight_grad_config_like(dy, x) if AUTOTUNE and x.numel() else None
    need = (need_proj_h, need_proj_w, need_fuse)
    grads, calls = weight_grad_calls(
        dy, x, proj_h, bias_h, proj_w, bias_w, fuse, *need, arch_of(x), config
    )
    for call in calls:
        call.run(x)
    return grads
