"""The tiles of the forward kernel: the one that a shape is launched with, and any other.

Nothing else in the benchmarks knows how the kernels choose and take their tiles.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.shapes import DTYPES, Shape
from smlp import SMLPBlock
from smlp_kernels.configs import MixConfig, mix_config
from smlp_kernels.launch import arch_of
from smlp_kernels.mix_launch import mix_calls
from smlp_kernels.weights import Weights


def forward_tile(shape: Shape, dtype: str, arch: int, layout: str = "channels_last") -> MixConfig:
    """What a forward is launched with on a chip of compute capability ``arch`` / 10."""
    precision = "tf32" if dtype == "tf32" else "ieee"
    size = (shape.height, shape.width, shape.channels)
    return mix_config(*size, DTYPES[dtype], arch, precision, layout == "channels_last")


def variants(shape: Shape, arch: int) -> dict[str, MixConfig]:
    """What the report compares with each other, by name: bfloat16, channels_last."""
    tile = forward_tile(shape, "bf16", arch)
    return {f"{stages} stages": replace(tile, num_stages=stages) for stages in (2, 3)}


def with_tile(tile: MixConfig) -> Callable[[SMLPBlock], Callable[[Tensor], Tensor]]:
    """Make a forward without autograd from a block, launched with this tile or not at all."""

    def build(block: SMLPBlock) -> Callable[[Tensor], Tensor]:
        weights = Weights(
            block.proj_h.weight,
            block.proj_h.bias,
            block.proj_w.weight,
            block.proj_w.bias,
            block.fuse.weight,
            block.fuse.bias,
        )

        def call(x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            for one in mix_calls(x, weights, y, arch_of(x), tile):
                one.launch(x)  # run() would take fewer stages where they do not fit
            return y

        return call

    return build
