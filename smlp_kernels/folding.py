"""``FoldedSMLPBlock``: a block folded by :mod:`smlp.folding`, on the fused kernels."""

import torch.fx
from torch import Tensor

from smlp.folding import PlainFoldedSMLPBlock
from smlp_kernels.functional import fused_smlp

torch.fx.wrap("fused_smlp")  # a call in the graph: it looks at values that have to be there


class FoldedSMLPBlock(PlainFoldedSMLPBlock):
    """:class:`smlp.folding.PlainFoldedSMLPBlock` on the fused kernels.

    It takes any floating-point type under autocast; see :func:`smlp_kernels.fused_smlp` for
    numerics, errors and what falls back to PyTorch.
    """

    plain_class = PlainFoldedSMLPBlock  # for smlp.export

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` of ``[B, C, H, W]``."""
        return fused_smlp(x, self.weight_h, None, self.weight_w, None, self.weight_fuse, self.bias)
