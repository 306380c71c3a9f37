"""SMLPNet: the network of the sMLP paper, in its three published sizes."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.fx
from einops import rearrange
from torch import Tensor, nn

from smlp.block import PixelMean, SMLPBlock
from smlp.network import Layers, PyramidNetwork, Size, rate

torch.fx.wrap("rearrange")  # a call in the graph: it asks for the shape

BuildBlock = Callable[[int, int, int], nn.Module]
"""Builds the module that mixes pixels, from the height, width and channels of its input."""

PAPER_BLOCK = partial(SMLPBlock, fuse_bias=False)


class DropPath(nn.Module):
    """Stochastic depth: in training drop whole samples of a residual branch.

    Huang et al. (arXiv 1603.09382). Branches that are kept are divided by the probability of
    keeping them, so that the expectation stays the same.

    Args:
        drop_rate: the probability of dropping a sample, in [0, 1).

    Raises:
        TypeError: if ``drop_rate`` is not a number.
        ValueError: if it is outside.
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = rate("drop_rate", drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, C, H, W] with random samples zeroed in training, of the same shape."""
        if not self.training or self.drop_rate == 0.0:
            return x
        keep = 1.0 - self.drop_rate
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate:.3g}"


class SMLPNetLayer(nn.Module):
    """``x += TokenMix(x); x += ChannelMix(x)``, each with drop path.

    Token mixing is BN, GELU, depthwise 3x3, BN, GELU, :class:`SMLPBlock`, without biases in the
    depthwise convolution and the block's ``fuse``; channel mixing is LN, Linear, GELU, Linear.

    Args:
        height: H of the feature map.
        width: W of the feature map.
        channels: C of the feature map.
        expansion_factor: hidden channels of the channel MLP per channel.
        drop_rate: the probability of dropping each of the two branches for a sample.
        block: builds the module that mixes the pixels.
        depthwise: whether the depthwise convolution comes before it.
    """

    def __init__(
        self,
        height: int,
        width: int,
        channels: int,
        expansion_factor: int,
        drop_rate: float,
        block: BuildBlock = PAPER_BLOCK,
        depthwise: bool = True,
    ) -> None:
        super().__init__()
        self.local: nn.Module = nn.Identity()
        if depthwise:
            local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
            self.local = _normalised(channels, "conv", local)
        self.mix = _normalised(channels, "block", block(height, width, channels))
        self.norm_mlp = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, expansion_factor * channels),
            nn.GELU(),
            nn.Linear(expansion_factor * channels, channels),
        )
        self.drop_path = DropPath(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        x = x + self.drop_path(self.mix(self.local(x)))
        pixels = rearrange(x, "b c h w -> b h w c")
        mixed = rearrange(self.mlp(self.norm_mlp(pixels)), "b h w c -> b c h w")
        return x + self.drop_path(mixed)


def _normalised(channels: int, name: str, module: nn.Module) -> nn.Sequential:
    """BatchNorm, GELU, then the module."""
    return nn.Sequential(
        OrderedDict([("norm", nn.BatchNorm2d(channels)), ("activation", nn.GELU()), (name, module)])
    )


class SMLPNet(PyramidNetwork):
    """sMLPNet of "Sparse MLP for Image Recognition" (arXiv 2109.05422), figure 2 and section 4.

    Weights in the layout of the paper's code load with :func:`smlp.load_checkpoint`.

    Args:
        image_size, patch_size, in_channels, num_classes, d_model, depth, expansion_factor: as of
            :class:`smlp.network.PyramidNetwork`.
        drop_path_rate: drop-path rate of the last layer; it rises linearly from 0 at the first.
        block: builds the module that mixes the pixels in each layer; :mod:`smlp.ablations` has
            others.
        depthwise: whether the depthwise convolutions come before them.

    Raises:
        TypeError: as :class:`smlp.network.PyramidNetwork`, or if ``drop_path_rate`` is not a
            number.
        ValueError: as that, or if ``drop_path_rate`` is outside [0, 1).
    """

    def __init__(
        self,
        image_size: Size = 224,
        patch_size: Size = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        d_model: int = 80,
        depth: Sequence[int] = (2, 8, 14, 2),
        expansion_factor: int = 3,
        drop_path_rate: float = 0.0,
        block: BuildBlock = PAPER_BLOCK,
        depthwise: bool = True,
    ) -> None:
        super().__init__(
            image_size, patch_size, in_channels, num_classes, d_model, depth, expansion_factor
        )
        last_rate = rate("drop_path_rate", drop_path_rate)
        total = sum(self.depth)
        drop_rates = iter(last_rate * i / max(total - 1, 1) for i in range(total))
        self.stages = nn.ModuleList()
        inputs, step = self.in_channels, self.patch_size
        for (height, width), channels, layers in zip(
            self.sizes, self.channels, self.depth, strict=True
        ):
            downsample = nn.Conv2d(inputs, channels, kernel_size=step, stride=step, bias=False)
            mixing = (
                SMLPNetLayer(
                    *(height, width, channels, self.expansion_factor, next(drop_rates)),
                    block=block,
                    depthwise=depthwise,
                )
                for _ in range(layers)
            )
            self.stages.append(Layers(downsample, *mixing))
            inputs, step = channels, (2, 2)
        self.mlp_head = nn.Sequential(
            nn.BatchNorm2d(self.channels[-1]),
            PixelMean(2, 3),
            nn.Linear(self.channels[-1], self.num_classes),
        )

    def run_stages(self, x: Tensor, stages: int) -> list[Tensor]:
        """Compute :meth:`feature_maps` of images that fit."""
        pyramid = []
        for stage, _ in zip(self.stages, range(stages), strict=False):
            x = stage(x)
            pyramid.append(x)
        return pyramid


PUBLISHED: dict[str, dict[str, Any]] = {
    "smlpnet_tiny": {"d_model": 80, "depth": (2, 8, 14, 2), "drop_path_rate": 0.0},
    "smlpnet_small": {"d_model": 96, "depth": (2, 10, 24, 2), "drop_path_rate": 0.2},
    "smlpnet_base": {"d_model": 112, "depth": (2, 10, 24, 2), "drop_path_rate": 0.3},
}
"""The arguments of the paper's networks, as of :class:`SMLPNet`, by name."""


def smlpnet_tiny(**kwargs: Any) -> SMLPNet:
    """sMLPNet-T: 24.1 M parameters, 5.0 GMAC at 224; arguments as of :class:`SMLPNet`."""
    return SMLPNet(**PUBLISHED["smlpnet_tiny"] | kwargs)


def smlpnet_small(**kwargs: Any) -> SMLPNet:
    """sMLPNet-S: 48.6 M parameters, 10.3 GMAC at 224; arguments as of :class:`SMLPNet`."""
    return SMLPNet(**PUBLISHED["smlpnet_small"] | kwargs)


def smlpnet_base(**kwargs: Any) -> SMLPNet:
    """sMLPNet-B: 65.9 M parameters, 14.0 GMAC at 224; arguments as of :class:`SMLPNet`."""
    return SMLPNet(**PUBLISHED["smlpnet_base"] | kwargs)
