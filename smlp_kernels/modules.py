"""``FusedSMLPBlock``, the drop-in."""

from collections.abc import Sequence

import torch.fx
from torch import Tensor

from smlp import SMLPBlock
from smlp.block import check_input
from smlp_kernels.functional import autocast_type, dispatch


class FusedSMLPBlock(SMLPBlock):
    """:class:`smlp.SMLPBlock` on the fused kernels: same constructor, parameters and state dict.

    Same results to rounding. On a CUDA GPU forward and backward run on the kernels and only the
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
        weights = self.weights()
        check_input(x, weights[4], (self.channels, self.height, self.width))
        _check_weights(x, weights)
        return dispatch(x, *weights)


def _check_weights(x: Tensor, weights: Sequence[Tensor | None]) -> None:
    """Raise what PyTorch's operators would where weights are apart; a kernel would read on."""
    device, dtype = x.device, x.dtype
    for index, weight in enumerate(weights):
        if weight is None or (weight.device == device and weight.dtype is dtype):
            continue
        name = f"{('proj_h', 'proj_w', 'fuse')[index // 2]}.{('weight', 'bias')[index % 2]}"
        if weight.device != device:
            raise ValueError(f"{name}: expected the device of x, {device}, got {weight.device}")
        if autocast_type(x) is None:
            raise TypeError(f"{name}: expected the type of x, {dtype}, got {weight.dtype}")


# calls in the graph of torch.fx: they look at values that have to be there
torch.fx.wrap("check_input")
torch.fx.wrap("_check_weights")
torch.fx.wrap("dispatch")
