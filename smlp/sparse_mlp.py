"""SparseMLP: the widely used PyTorch port of sMLPNet, with Swin's patch merging between stages."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from smlp.block import PixelMean, Rearrange, SMLPBlock
from smlp.network import Layers, PyramidNetwork, Size, rate

_logger = logging.getLogger(__name__)


class PreNormResidual(nn.Module):
    """``x + fn(norm(x))``.

    Args:
        channels: C, what ``norm`` normalises over.
        fn: a module that keeps the shape of its input.
        norm: builds the normalisation from the number of channels.
    """

    def __init__(
        self, channels: int, fn: nn.Module, norm: Callable[[int], nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.fn = fn
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + fn(norm(x))``, of the shape of ``x``."""
        return x + self.fn(self.norm(x))


class PatchMerging(nn.Module):
    """Halve height and width and double the channels: gather 2x2, LayerNorm, Linear 4C -> 2C.

    Swin Transformer (arXiv 2103.14030), section 3.1. The four pixels are concatenated down the
    columns first: top left, bottom left, top right, bottom right.

    Args:
        channels: C, the number of channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gather = Rearrange("b (h dh) (w dw) c -> b h w (dw dh c)", dh=2, dw=2)
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, H, W, C]``, H and W even, to ``[B, H / 2, W / 2, 2C]``."""
        return self.reduction(self.norm(self.gather(x)))


class SparseMLPStage(nn.Module):
    """Layers of one resolution, then the step to the next.

    Each layer adds to its input in turn a 3x3 depthwise convolution after BatchNorm, the
    :class:`SMLPBlock` after BatchNorm, and a channel MLP after LayerNorm.

    Args:
        height: H of the feature map.
        width: W of the feature map.
        channels: C of the feature map.
        depth: the number of layers.
        expansion_factor: hidden channels of the channel MLP per channel.
        dropout: probability of dropout, twice in the channel MLP.
        merge: whether another stage follows, and patch merging leads to it.
    """

    def __init__(
        self,
        height: int,
        width: int,
        channels: int,
        depth: int,
        *,
        expansion_factor: int,
        dropout: float,
        merge: bool,
    ) -> None:
        super().__init__()
        self.patch_merge: nn.Module = nn.Identity()
        if merge:
            self.patch_merge = nn.Sequential(
                Rearrange("b c h w -> b h w c"),
                PatchMerging(channels),
                Rearrange("b h w c -> b c h w"),
            )
        self.model = Layers(
            *(_layer(height, width, channels, expansion_factor, dropout) for _ in range(depth))
        )
        self.register_load_state_dict_pre_hook(_drop_unused_merge)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the layers, then the merging.

        Args:
            x: ``[B, C, H, W]``.

        Returns:
            The features of this stage, ``[B, C, H, W]``, and the input of the next,
            ``[B, 2C, H / 2, W / 2]``; in the last stage the features twice.
        """
        features = self.model(x)
        return features, self.patch_merge(features)


class SparseMLP(PyramidNetwork):
    """sMLPNet as commonly ported to PyTorch: patches, stages of sMLP layers, and a linear head.

    A state dict of that port loads unchanged, except for a patch merging of the last stage, which
    the port has but never uses. There is none here: loading one logs a warning and leaves it out.

    Args:
        image_size, patch_size, in_channels, num_classes, d_model, depth, expansion_factor: as of
            :class:`smlp.network.PyramidNetwork`.
        patcher_norm: whether a LayerNorm follows the patch convolution.
        dropout: probability of dropout in the channel MLPs.

    Raises:
        TypeError: as :class:`smlp.network.PyramidNetwork`, or if ``dropout`` is not a number.
        ValueError: as that, or if ``dropout`` is outside [0, 1).
    """

    def __init__(
        self,
        image_size: Size = 224,
        patch_size: Size = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        d_model: int = 96,
        depth: Sequence[int] = (2, 10, 24, 2),
        expansion_factor: int = 2,
        patcher_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            image_size, patch_size, in_channels, num_classes, d_model, depth, expansion_factor
        )
        rate("dropout", dropout)

        norm: nn.Module = nn.Identity()
        if patcher_norm:
            norm = nn.Sequential(
                Rearrange("b c h w -> b h w c"),
                nn.LayerNorm(self.channels[0]),
                Rearrange("b h w c -> b c h w"),
            )
        patch = nn.Conv2d(
            self.in_channels, self.channels[0], self.patch_size, stride=self.patch_size
        )
        self.patcher = nn.Sequential(patch, norm)
        self.layers = nn.ModuleList(
            SparseMLPStage(
                height,
                width,
                channels,
                layers,
                expansion_factor=self.expansion_factor,
                dropout=dropout,
                merge=stage + 1 < len(self.depth),
            )
            for stage, ((height, width), channels, layers) in enumerate(
                zip(self.sizes, self.channels, self.depth, strict=True)
            )
        )
        self.mlp_head = nn.Sequential(
            Rearrange("b c h w -> b h w c"),
            nn.LayerNorm(self.channels[-1]),
            PixelMean(1, 2),
            nn.Linear(self.channels[-1], self.num_classes),
        )

    def run_stages(self, x: Tensor, stages: int) -> list[Tensor]:
        """Compute :meth:`feature_maps` of images that fit."""
        pyramid = []
        x = self.patcher(x)
        for stage, _ in zip(self.layers, range(stages), strict=False):
            features, x = stage(x)
            pyramid.append(features)
        return pyramid


def _layer(
    height: int, width: int, channels: int, expansion_factor: int, dropout: float
) -> nn.Sequential:
    local = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
    hidden = expansion_factor * channels
    channel_mlp = nn.Sequential(
        nn.Linear(channels, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, channels),
        nn.Dropout(dropout),
    )
    block = SMLPBlock(height, width, channels)
    return nn.Sequential(
        PreNormResidual(channels, nn.Sequential(local), norm=nn.BatchNorm2d),
        PreNormResidual(channels, nn.Sequential(block), norm=nn.BatchNorm2d),
        Rearrange("b c h w -> b h w c"),
        PreNormResidual(channels, channel_mlp),
        Rearrange("b h w c -> b c h w"),
    )


def _drop_unused_merge(
    stage: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Leave out of ``state_dict`` (load_state_dict's own copy) a patch merging nothing follows."""
    if not isinstance(stage.patch_merge, nn.Identity):
        return
    unused = [name for name in state_dict if name.startswith(f"{prefix}patch_merge.")]
    for name in unused:
        del state_dict[name]
    if unused:
        _logger.warning(
            "the state dict has a patch merging of the last stage, which no output depends on; "
            "left out: %s",
            ", ".join(unused),
        )
