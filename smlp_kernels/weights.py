"""The six weights of a block under one name, and as the kernels read them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """What a block applies to its input ``[B, C, H, W]``; any floating-point types and strides."""

    proj_h: Tensor  # [H, H] out, in
    bias_h: Tensor | None  # [H]
    proj_w: Tensor  # [W, W] out, in
    bias_w: Tensor | None  # [W]
    fuse: Tensor  # [C, 3C], [C, 3C, 1, 1] or [C, 3, C]: out, branch (h, w, identity), in
    bias: Tensor | None  # [C] or [C, H, W]

    def transposed(self) -> "Weights":
        """Views that turn a gradient of the output into that of the input."""
        fuse = self.fuse
        if fuse.dim() != 3:
            fuse = fuse.reshape(fuse.shape[0], -1).unflatten(1, (3, -1))
        return Weights(self.proj_h.t(), None, self.proj_w.t(), None, fuse.transpose(0, 2), None)


Along = tuple[Tensor, Tensor | None]  # a projection and its bias


def as_read(x: Tensor, weights: Sequence[Any]) -> tuple[Along, Along, Tensor]:
    """Weights as the kernels read them: what is along H, what is along W, and ``fuse``.

    Matrices are in the type of ``x``, all but ``fuse`` dense; they are copied only as needed.
    """
    proj_h, bias_h, proj_w, bias_w, fuse, _ = weights
    if not (x.dtype is proj_h.dtype is proj_w.dtype is fuse.dtype):
        proj_h, proj_w, fuse = in_type_of(x, proj_h, proj_w, fuse)
    return (proj_h.contiguous(), dense(bias_h)), (proj_w.contiguous(), dense(bias_w)), fuse


def dense(bias: Tensor | None) -> Tensor | None:
    """A contiguous bias, as the kernels need it; a gradient in its place may be expanded."""
    return None if bias is None else bias.contiguous()


def in_type_of(x: Tensor, *weights: Any) -> Sequence[Any]:
    """Weights, or None, in the type of ``x``; all that autocast converts takes one launch."""
    dtype = x.dtype
    for weight in weights:
        if weight is not None and weight.dtype is not dtype:
            break
    else:
        return weights
    given = [weight for weight in weights if weight is not None]
    converted = [torch.empty_like(weight, dtype=dtype) for weight in given]
    torch._foreach_copy_(converted, given)
    new = iter(converted)
    return [None if weight is None else next(new) for weight in weights]
