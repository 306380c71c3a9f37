"""The block as a careful user would write it in torch: channels first, then the axes, no concat.

Mixing an axis and multiplying channels commute, so with ``F = [F_h | F_w | F_i]``::

    y = P_h (F_h x) + (F_w x) P_w^T + F_i x + b_f + b_h sum_c F_h + b_w sum_c F_w

which costs the same multiply-adds as the published order and never builds the 3C concatenation. All
products are matrix products on views; no permuted copy is made in either memory format.
"""

import torch
from torch import Tensor

from smlp import SMLPBlock


def channels_first(block: SMLPBlock, x: Tensor) -> Tensor:
    """``block(x)`` for x ``[B, C, H, W]`` in the order above, by products that suit x's layout."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return _channels_last(block, x)
    return _nchw(block, x)


def _channels_last(block: SMLPBlock, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    fuse = block.fuse.weight.view(channels, 3, channels)  # [out, branch, in]
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # [BHW, C], a view
    # one batched product: [3, BHW, C] @ [3, C, C], three contiguous results
    z_h, z_w, z_i = torch.bmm(rows.expand(3, -1, -1), fuse.permute(1, 2, 0)).unbind()
    out = _add_product(
        z_i.view(batch, height, width * channels),
        block.proj_h.weight.expand(batch, -1, -1),
        z_h.view(batch, height, width * channels),
    )
    out = _add_product(
        out.view(batch * height, width, channels),
        block.proj_w.weight.expand(batch * height, -1, -1),
        z_w.view(batch * height, width, channels),
    )
    out = _add(out.view(batch, height, width, channels), _bias(block).permute(1, 2, 0))
    return out.permute(0, 3, 1, 2)


def _nchw(block: SMLPBlock, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    fuse_h, fuse_wi = block.fuse.weight.view(channels, 3, channels).split((1, 2), dim=1)
    pixels = x.reshape(batch, channels, height * width)
    # two products, because z_h must be contiguous to be seen as [BC, H, W]
    z_h = torch.bmm(fuse_h.squeeze(1).expand(batch, -1, -1), pixels)
    fuse_wi = fuse_wi.transpose(0, 1).reshape(2 * channels, channels)
    z_w, z_i = torch.bmm(fuse_wi.expand(batch, -1, -1), pixels).chunk(2, dim=1)
    out = torch.baddbmm(
        z_i.view(batch, channels * height, width),
        z_w.view(batch, channels * height, width),
        block.proj_w.weight.t().expand(batch, -1, -1),
    )
    out = _add_product(
        out.view(batch * channels, height, width),
        block.proj_h.weight.expand(batch * channels, -1, -1),
        z_h.view(batch * channels, height, width),
    )
    return _add(out.view(batch, channels, height, width), _bias(block))


def _bias(block: SMLPBlock) -> Tensor:
    """All three biases as one map ``[C, H, W]``."""
    channels = block.channels
    sum_h, sum_w, _ = block.fuse.weight.view(channels, 3, channels).sum(dim=2).unbind(dim=1)
    bias = torch.outer(sum_h, block.proj_h.bias)[:, :, None]
    bias = bias + torch.outer(sum_w, block.proj_w.bias)[:, None, :]
    return bias if block.fuse.bias is None else bias + block.fuse.bias[:, None, None]


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``out + a @ b`` per batch entry, in place where autograd does not need ``out`` again."""
    # baddbmm copies ``out``, one more pass over y, but autograd refuses to overwrite these views
    return torch.baddbmm(out, a, b) if torch.is_grad_enabled() else out.baddbmm_(a, b)


def _add(out: Tensor, bias: Tensor) -> Tensor:
    return out + bias if torch.is_grad_enabled() else out.add_(bias)
