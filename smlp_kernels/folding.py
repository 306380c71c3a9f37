"""Folding BatchNorm and residual into the linear steps between them, for inference.

In eval mode BatchNorm is ``a * x + s`` with a scale and a shift for each channel. With
``F = [Fh | Fw | Fi]`` the 1x1 fusion of a block, ``x + block(a * x + s)`` is a block again::

    F'             = [Fh a | Fw a | Fi a + 1]
    bias'[:, h, w] = bias + (Fh s) rowsum(Ph)[h] + rowsum(Fh) bh[h]
                          + (Fw s) rowsum(Pw)[w] + rowsum(Fw) bw[w] + Fi s

one call of the block instead of three steps. ``x + conv(a * x + s)`` of a depthwise
convolution folds likewise; its padding is zero after the shift, so its bias differs along borders.
All of it is computed in float64 and rounded once to the type of the parameters. Which parts of a
network may be folded is for :mod:`smlp_kernels.foldable` to say.
"""

import copy

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from smlp import SMLPBlock
from smlp.block import Unscripted
from smlp.functional import smlp
from smlp_kernels.functional import fused_smlp

torch.fx.wrap("fused_smlp")  # a call in the graph: it looks at values that have to be there


class PlainFoldedSMLPBlock(Unscripted):
    """``x + block(norm(x))``, BatchNorm in eval mode, as one block on PyTorch's operators.

    Maps ``[B, C, H, W]`` of the type of its buffers to the same shape; nothing to train.

    Args:
        block: the block, plain or fused.
        norm: what its input passes first, with running statistics.
    """

    weight_h: Tensor  # [H, H]
    weight_w: Tensor  # [W, W]
    weight_fuse: Tensor  # [C, 3C]
    bias: Tensor  # [C, H, W]

    def __init__(self, block: SMLPBlock, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = scale_and_shift(norm)
        proj_h, proj_w = block.proj_h, block.proj_w
        fuse_h, fuse_w, fuse_i = block.fuse.weight.detach().double()[:, :, 0, 0].chunk(3, dim=1)
        bias = (fuse_i @ shift)[:, None, None]
        bias = bias + _along_axis(fuse_h, shift, proj_h)[:, :, None]
        bias = bias + _along_axis(fuse_w, shift, proj_w)[:, None, :]
        if block.fuse.bias is not None:
            bias = bias + block.fuse.bias.detach().double()[:, None, None]
        identity = fuse_i * scale + torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        fuse = torch.cat([fuse_h * scale, fuse_w * scale, identity], dim=1)
        dtype = block.fuse.weight.dtype
        self.register_buffer("weight_h", proj_h.weight.detach().clone())
        self.register_buffer("weight_w", proj_w.weight.detach().clone())
        self.register_buffer("weight_fuse", fuse.to(dtype))
        # channels last, as it is read beside a channels-last output
        self.register_buffer("bias", bias.to(dtype).permute(1, 2, 0).contiguous().movedim(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` of ``[B, C, H, W]``."""
        fuse = self.weight_fuse[:, :, None, None]
        y = smlp(x, self.weight_h, None, self.weight_w, None, fuse, None)
        return y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        channels, height, width = self.bias.shape
        return f"height={height}, width={width}, channels={channels}"


class FoldedSMLPBlock(PlainFoldedSMLPBlock):
    """:class:`PlainFoldedSMLPBlock` on the fused kernels.

    Takes any floating type under autocast; see :func:`smlp_kernels.fused_smlp` for numerics, errors
    and what falls back to PyTorch.
    """

    plain_class = PlainFoldedSMLPBlock  # for smlp.export

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` of ``[B, C, H, W]``."""
        return fused_smlp(x, self.weight_h, None, self.weight_w, None, self.weight_fuse, self.bias)


class FoldedDepthwise(nn.Module):
    """``x + conv(norm(x))``, a depthwise 3x3 convolution after BatchNorm in eval mode.

    Args:
        conv: the convolution: stride 1, padding 1, zeros.
        norm: what its input passes first, with running statistics.
        height: H of the input ``[B, C, H, W]``.
        width: W of the input.
    """

    weight: Tensor  # [C, 1, 3, 3]
    bias: Tensor  # [C, H, W]

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, height: int, width: int) -> None:
        super().__init__()
        scale, shift = scale_and_shift(norm)
        weight = conv.weight.detach().double()
        shifts = shift[:, None, None].expand(-1, height, width)
        bias = None if conv.bias is None else conv.bias.detach().double()
        bias = F.conv2d(shifts[None], weight, bias, padding=1, groups=len(shift))[0]
        weight = weight * scale[:, None, None, None]
        weight[:, 0, 1, 1] += 1  # the residual
        dtype = conv.weight.dtype
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype).permute(1, 2, 0).contiguous().movedim(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` of ``[B, C, H, W]``."""
        y = F.conv2d(x, self.weight, padding=1, groups=self.weight.shape[0])
        return y + self.bias.to(y.dtype)


def _along_axis(fuse: Tensor, shift: Tensor, proj: nn.Linear) -> Tensor:
    """The bias ``[C, N]`` that one projection, of N positions, leaves behind its fusion [C, C]."""
    from_shift = torch.outer(fuse @ shift, proj.weight.detach().double().sum(1))
    if proj.bias is None:
        return from_shift
    return from_shift + torch.outer(fuse.sum(1), proj.bias.detach().double())


def convolution_then_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """``norm(conv(x))``, BatchNorm in eval mode, as one convolution with a bias."""
    scale, bias = scale_and_shift(norm)
    if conv.bias is not None:
        bias = bias + scale * conv.bias.detach().double()
    folded = copy.deepcopy(conv)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype))
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return folded


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What BatchNorm does in eval mode, ``scale * x + shift``; both ``[C]``, float64.

    Raises:
        ValueError: if ``norm`` has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected running statistics, got a BatchNorm that keeps none")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift
