"""``FusedSMLPBlock``, the drop-in replacement of ``smlp.SMLPBlock``."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor

from smlp import SMLPBlock
from smlp.block import check_input
from smlp_kernels import ops
from smlp_kernels.functional import autocast_type, check_weights, dispatch

# torch.compile's check of the inputs of a graph, one call of 0.7 us for all. Where it is missing,
# every call checks each tensor in full, which is slower.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards: Any = getattr(_guards, "TensorGuards", None)

NAMES = [
    f"{module}.{kind}" for module in ("proj_h", "proj_w", "fuse") for kind in ("weight", "bias")
]
KNOWN = 8  # kinds of arguments remembered per size: types, gradients wanted, inference mode


class FusedSMLPBlock(SMLPBlock):
    """:class:`smlp.SMLPBlock` on the fused kernels: same constructor, parameters and state dict.

    Results are the same to rounding. On a CUDA GPU forward and backward run on the kernels, and
    only the input is kept for the backward; elsewhere this is the plain block. See
    :func:`smlp_kernels.fused_smlp` for numerics, limits and what falls back to PyTorch. So does a
    block with hooks on a submodule (pruning) or another module in its place (an adapter): the
    kernels see only weights and biases. Hooks on every module (``register_module_forward_hook``)
    do not see its submodules.
    """

    plain_class = SMLPBlock  # for smlp.export

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`smlp.SMLPBlock.forward`, with the same errors.

        Raises:
            ValueError: also if a parameter was replaced by one of another shape or device.
            TypeError: also if a parameter was replaced by one of another dtype.
        """
        if not self.is_determined_by_weights():
            return super().forward(x)
        return run(x, self.weights(), (self.channels, self.height, self.width))


def run(
    x: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None],
    size: tuple[int, int, int],
) -> Tensor:
    """Check the arguments, unless they are like earlier ones, and compute the block.

    ``size`` is C, H, W.
    """
    tensors = (x, *weights) if weights[5] is not None else (x, *weights[:5])
    key = (len(tensors), *size)
    can_be_known = not (torch.compiler.is_compiling() or ops.dispatch_modes())
    for are_alike in alike.get(key, ()) if can_be_known else ():
        if are_alike(*tensors):
            return dispatch(x, weights, plain=True)
    check_input(x, weights[4], size)
    check_weights(NAMES, weights, x, [[size[0], 3 * size[0], 1, 1]], [[size[0]]])
    if ops.is_plain((x, *weights)) and autocast_type(x) is None:
        remember(key, tensors)
    return dispatch(x, weights)


# By the number of tensors and C, H, W: checks that tensors are like earlier ones, which were plain
# and outside autocast: same classes, dtypes, devices and sizes (except of the batch), and the same
# transforms, tracing and autocast acting on them. They overlook PyTorch's own modes: see above.
alike: dict[tuple[int, ...], tuple[Callable[..., bool], ...]] = {}


def remember(key: tuple[int, ...], tensors: tuple[Any, ...]) -> None:
    """Let tensors like these pass from now on."""
    if TensorGuards is None or any(tensor is None for tensor in tensors):
        return
    sizes: Any = [list(tensor.shape) for tensor in tensors]
    sizes[0][0] = None  # whatever the batch
    strides = [[None] * len(size) for size in sizes]
    with contextlib.suppress(TypeError):  # from a version that takes other arguments
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        alike[key] = (guards.check, *alike.get(key, ())[: KNOWN - 1])


torch.fx.wrap("run")  # a call in the graph: it looks at values that have to be there
