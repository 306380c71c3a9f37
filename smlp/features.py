"""Inside a network: its layers one by one, and what each of them sees."""

from torch import Tensor, nn

from smlp.block import as_integer
from smlp.network import PyramidNetwork
from smlp.receptive_field import receptive_field
from smlp.smlpnet import SMLPNet, SMLPNetLayer
from smlp.sparse_mlp import SparseMLP


def layers(network: PyramidNetwork) -> list[nn.Module]:
    """Return the layers of all stages in order; each maps ``[B, C, H, W]`` to the same shape.

    Raises:
        TypeError: if ``network`` is neither a SparseMLP nor an SMLPNet.
    """
    if isinstance(network, SMLPNet):
        return [module for module in network.modules() if isinstance(module, SMLPNetLayer)]
    if isinstance(network, SparseMLP):
        return [
            layer for stage in network.layers for layer in stage.get_submodule("model").children()
        ]
    raise TypeError(f"network: expected a SparseMLP or an SMLPNet, got {type(network).__name__}")


class UpToLayer(nn.Module):
    """A network cut off after one of its layers.

    Args:
        network: the network; it is kept, not copied.
        depth: how many layers to run, from 1.

    Raises:
        TypeError: if ``network`` is none of ours.
        ValueError: if it has fewer layers.
    """

    def __init__(self, network: PyramidNetwork, depth: int) -> None:
        super().__init__()
        every = layers(network)
        if as_integer(depth) not in range(1, len(every) + 1):
            raise ValueError(f"depth: expected 1 to {len(every)} layers, got {depth}")
        self.network, self.depth = network, depth

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_channels, *image_size]`` to the ``[B, C, H, W]`` after the last layer."""
        outputs: list[Tensor] = []
        last = layers(self.network)[self.depth - 1]
        handle = last.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
        try:
            self.network.feature_maps(x)
        finally:
            handle.remove()
        return outputs[0]


def receptive_fields(
    network: PyramidNetwork, inputs: Tensor, depths: list[int]
) -> dict[int, Tensor]:
    """Measure the receptive field of the central pixel after some of the layers.

    Args:
        network: the network, trained or not.
        inputs: ``[B, in_channels, *image_size]``: noise, or real images.
        depths: numbers of layers after which to measure.

    Returns:
        ``[*image_size]`` for each depth, see :func:`smlp.receptive_field`.

    Raises:
        TypeError: if ``network`` is none of ours, or ``inputs`` is not a floating-point tensor.
        ValueError: if a depth or the shape of ``inputs`` does not fit the network.
    """
    return {depth: receptive_field(UpToLayer(network, depth), inputs) for depth in depths}
