"""The tiles of the forward kernel: the one that a shape is launched with, and any other.

Nothing else in the benchmarks knows how the kernels choose or take their tiles.
"""

from benchmarks.shapes import DTYPES, Shape
from smlp_kernels.configs import MixConfig, mix_config


def forward_tile(shape: Shape, dtype: str, arch: int, layout: str = "channels_last") -> MixConfig:
    """What a forward is launched with on a chip of compute capability ``arch`` / 10."""
    precision = "tf32" if dtype == "tf32" else "ieee"
    size = (shape.height, shape.width, shape.channels)
    return mix_config(*size, DTYPES[dtype], arch, precision, layout == "channels_last")
