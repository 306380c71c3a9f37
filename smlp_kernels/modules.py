"""``FusedSMLPBlock``, the drop-in."""

from torch import Tensor

from smlp import SMLPBlock
from smlp_kernels.functional import dispatch


class FusedSMLPBlock(SMLPBlock):
    """:class:`smlp.SMLPBlock` on the fused kernels: same constructor, parameters and state dict.

    Same results to rounding. On a CUDA GPU forward and backward run on Triton kernels and only the
    input is kept for backward; elsewhere this is the plain block. See
    :func:`smlp_kernels.fused_smlp` for numerics, limits and what falls back to PyTorch. So does a
    block with hooks on a submodule or another module in the place of one, as adapters and pruning
    put there: the kernels see weights and biases alone.
    """

    plain_class = SMLPBlock  # for smlp.export

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`smlp.SMLPBlock.forward`, with the same errors."""
        if not self.is_determined_by_weights():
            return super().forward(x)
        self.check_input(x)
        return dispatch(x, *self.weights())
