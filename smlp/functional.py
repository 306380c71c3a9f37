"""The sMLP block as a function of its weights."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def smlp(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_fuse: Tensor,
    bias_fuse: Tensor | None,
) -> Tensor:
    """Project along H, project along W, keep the identity, fuse by a 1x1 convolution.

    Section 3.2 of arXiv 2109.05422; see :class:`smlp.SMLPBlock` for the formula.

    Args:
        x: ``[B, C, H, W]``.
        weight_h: ``[H, H]``, from (second index) to (first index) rows.
        bias_h: ``[H]`` or None.
        weight_w: ``[W, W]``.
        bias_w: ``[W]`` or None.
        weight_fuse: ``[C, 3C, 1, 1]``; columns in the order h, w, identity.
        bias_fuse: ``[C]`` or None.

    Returns:
        ``[B, C, H, W]``.
    """
    x_h = F.linear(rearrange(x, "b c h w -> b c w h"), weight_h, bias_h)
    x_w = F.linear(x, weight_w, bias_w)
    # under autocast the projections come in its type, and so will the convolution take x
    identity = x.to(x_w.dtype)
    branches = torch.cat([rearrange(x_h, "b c w h -> b c h w"), x_w, identity], dim=1)
    return F.conv2d(branches, weight_fuse, bias_fuse)
