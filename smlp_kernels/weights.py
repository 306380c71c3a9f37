"""The six weights of a block under one name."""

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """What a block applies to its input ``[B, C, H, W]``; any floating types, any strides."""

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
