"""SMLPNet with one of its ideas taken away: the ablations of the sMLP paper, as arguments.

Each is the paper's network with one change, so that a difference in the results comes from that
change; parameters and multiply-adds differ as a consequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.fx
from einops import rearrange
from torch import Tensor, nn

from smlp.block import AxisMixing, positive_int
from smlp.smlpnet import SMLPNet, smlpnet_tiny

torch.fx.wrap("rearrange")  # a call in the graph: it asks for the shape


class _Ablated(AxisMixing):
    """Base of the changed blocks: the two projections of :class:`smlp.SMLPBlock`, as modules."""

    def __init__(self, height: int, width: int, channels: int, branches: int) -> None:
        super().__init__(height, width)
        channels = positive_int("channels", channels)
        self.proj_h = nn.Linear(self.height, self.height)
        self.proj_w = nn.Linear(self.width, self.width)
        self.fuse = nn.Conv2d(branches * channels, channels, kernel_size=1, bias=False)

    def along_height(self, x: Tensor) -> Tensor:
        return rearrange(self.proj_h(rearrange(x, "b c h w -> b c w h")), "b c w h -> b c h w")


class OneAxisBlock(_Ablated):
    """``fuse(concat(projection along one axis, x))``: a row or a column, no cross.

    Args:
        height: H of the feature map.
        width: W of the feature map.
        channels: C of the feature map.
        axis: ``"height"`` or ``"width"``, along which pixels are mixed.

    Raises:
        ValueError: if ``axis`` is another word.
    """

    def __init__(self, height: int, width: int, channels: int, *, axis: str) -> None:
        if axis not in ("height", "width"):
            raise ValueError(f"axis: expected 'height' or 'width', got {axis!r}")
        super().__init__(height, width, channels, branches=2)
        self.axis = axis
        delattr(self, "proj_w" if axis == "height" else "proj_h")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        mixed = self.along_height(x) if self.axis == "height" else self.proj_w(x)
        return self.fuse(torch.cat([mixed, x], dim=1))


class NoIdentityBlock(_Ablated):
    """``fuse(concat(x_h, x_w))``."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__(height, width, channels, branches=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        return self.fuse(torch.cat([self.along_height(x), self.proj_w(x)], dim=1))


class SumBlock(_Ablated):
    """``fuse(x_h + x_w + x)``."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__(height, width, channels, branches=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        return self.fuse(self.along_height(x) + self.proj_w(x) + x)


class SequentialBlock(_Ablated):
    """``fuse(concat(proj_w(proj_h(x)), x))``: one block sees the whole image."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        super().__init__(height, width, channels, branches=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        return self.fuse(torch.cat([self.proj_w(self.along_height(x)), x], dim=1))


# What each changes in the arguments of SMLPNet; single_stage depends on the network.
_CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "no_depthwise": {"depthwise": False},
    "height_only": {"block": partial(OneAxisBlock, axis="height")},
    "width_only": {"block": partial(OneAxisBlock, axis="width")},
    "no_identity": {"block": NoIdentityBlock},
    "sum": {"block": SumBlock},
    "sequential": {"block": SequentialBlock},
    "single_stage": {},
}

ABLATIONS: dict[str, str] = {
    "none": "the network of the paper",
    "no_depthwise": "without the 3x3 depthwise convolution",
    "height_only": "projection along H and identity alone",
    "width_only": "projection along W and identity alone",
    "no_identity": "without the identity branch",
    "sum": "branches added instead of concatenated",
    "sequential": "projection along W after the one along H, next to identity",
    "single_stage": "all layers at the resolution of the deepest stage",
}
"""The name of each ablation and what it changes."""


def ablate(name: str, build: Callable[..., SMLPNet] = smlpnet_tiny, **arguments: Any) -> SMLPNet:
    """Build an SMLPNet with one change.

    ``single_stage`` runs all layers at the resolution and with the channels of the stage that has
    the most of them (the last such stage, if there are several); its patches are larger to match.

    Args:
        name: one of :data:`ABLATIONS`.
        build: which network to change.
        arguments: of ``build``.

    Raises:
        ValueError: if there is no such ablation, or a size does not fit.
        TypeError: if a size is not an integer.
    """
    if name not in _CHANGES:
        raise ValueError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {name!r}")
    changes = _CHANGES[name]
    if name == "single_stage":
        with torch.device("meta"):
            changes = _single_stage(build(**arguments))
    return build(**{**arguments, **changes})


def _single_stage(network: SMLPNet) -> dict[str, Any]:
    deepest = max(range(len(network.depth)), key=lambda stage: (network.depth[stage], stage))
    return {
        "patch_size": network.strides[deepest],
        "d_model": network.channels[deepest],
        "depth": (sum(network.depth),),
    }
