"""``FusedSMLPBlock``, the drop-in."""

from collections.abc import Sequence

import torch.fx
from torch import Tensor

from smlp import SMLPBlock
from smlp_kernels.functional import autocast_type, dispatch


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
        weights = self.weights()
        _check_weights(x, weights)
        return dispatch(x, *weights)


def _check_weights(x: Tensor, weights: Sequence[Tensor | None]) -> None:
    """Raise what PyTorch's operators would where weights are apart; a kernel would read on."""
    for name, weight in zip(_WEIGHTS, weights, strict=True):
        if weight is None or (weight.device == x.device and weight.dtype == x.dtype):
            continue
        if weight.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {weight.device}")
        if autocast_type(x) is None:
            raise TypeError(f"{name}: expected the type of x, {x.dtype}, got {weight.dtype}")


_WEIGHTS = tuple(f"{p}.{e}" for p in ("proj_h", "proj_w", "fuse") for e in ("weight", "bias"))

# calls in the graph of torch.fx: they look at values that have to be there
torch.fx.wrap("_check_weights")
torch.fx.wrap("dispatch")
