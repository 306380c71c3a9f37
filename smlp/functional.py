"""The sMLP block as a function of its weights."""

from collections.abc import Callable
from functools import partial

import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

torch.fx.wrap("rearrange")  # a call in the graph: it asks for the shape


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
    return mix_and_fuse(
        x,
        partial(F.linear, weight=weight_h, bias=bias_h),
        partial(F.linear, weight=weight_w, bias=bias_w),
        partial(F.conv2d, weight=weight_fuse, bias=bias_fuse),
    )


def mix_and_fuse(
    x: Tensor,
    proj_h: Callable[[Tensor], Tensor],
    proj_w: Callable[[Tensor], Tensor],
    fuse: Callable[[Tensor], Tensor],
) -> Tensor:
    """The block of any three steps: two along the last axis, and one over 3C channels."""
    x_h = proj_h(rearrange(x, "b c h w -> b c w h"))
    x_w = proj_w(x)
    # under autocast the projections come in its type, and so will the convolution take x
    identity = x.to(x_w.dtype)
    return fuse(torch.cat([rearrange(x_h, "b c w h -> b c h w"), x_w, identity], dim=1))


class Rearrange(nn.Module):
    """einops' ``rearrange`` as a module; unlike einops' own, ``torch.fx`` can trace it.

    Args:
        pattern: of ``rearrange``.
        sizes: of axes in it.
    """

    def __init__(self, pattern: str, **sizes: int) -> None:
        super().__init__()
        self.pattern, self.sizes = pattern, sizes

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rearranged."""
        return rearrange(x, self.pattern, **self.sizes)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.pattern), *(f"{k}={v}" for k, v in self.sizes.items())])


class PixelMean(nn.Module):
    """The mean over all pixels.

    Args:
        axes: height and width among the axes of the input.
    """

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C]``."""
        return x.mean(self.axes)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.axes))
