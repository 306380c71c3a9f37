"""The published sMLPNets in timm's registry: importing this module registers them.

::

    import timm
    import smlp.timm_models

    model = timm.create_model("smlpnet_tiny", num_classes=10)
    backbone = timm.create_model("smlpnet_tiny", features_only=True, out_indices=(1, 2, 3))

With this import added to them, timm's ``train.py`` and ``validate.py`` work, except for their
options ``--torchscript`` and ``--reparam`` (which takes a block's ``fuse``, a convolution, for a
method).

Needs the extra ``imagenet``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from smlp.checkpoint import load_checkpoint
from smlp.network import FeaturePyramid
from smlp.smlpnet import PUBLISHED
from smlp.timm_network import DEFAULT_CFG, TimmSMLPNet

try:
    from timm.models import (  # type: ignore[import-not-found,unused-ignore]
        FeatureInfo,
        register_model,
    )
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
    raise ImportError(
        "smlp.timm_models needs a timm that works with the installed torch "
        f"{torch.__version__}: pip install torchvision timm (importing it failed: {error})"
    ) from error

default_cfgs = {name: dict(DEFAULT_CFG) for name in PUBLISHED}  # timm's registry looks for these


@register_model
def smlpnet_tiny(**kwargs: Any) -> nn.Module:
    """sMLPNet-T, see :func:`smlp.smlpnet_tiny`; arguments by timm's names."""
    return _create("smlpnet_tiny", **kwargs)


@register_model
def smlpnet_small(**kwargs: Any) -> nn.Module:
    """sMLPNet-S, see :func:`smlp.smlpnet_small`; arguments by timm's names."""
    return _create("smlpnet_small", **kwargs)


@register_model
def smlpnet_base(**kwargs: Any) -> nn.Module:
    """sMLPNet-B, see :func:`smlp.smlpnet_base`; arguments by timm's names."""
    return _create("smlpnet_base", **kwargs)


def _create(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network from the arguments that ``timm.create_model`` passes on.

    Args:
        name: of one of :data:`smlp.smlpnet.PUBLISHED`.
        pretrained: whether to load the file that ``pretrained_cfg_overlay`` names.
        pretrained_cfg: ignored, as ``cache_dir``: no weights come with the networks.
        pretrained_cfg_overlay: ``file`` names a file that :func:`smlp.load_checkpoint` reads; if
            ``num_classes`` is there too, and another number, the classifier is not loaded.
        cache_dir: ignored.
        features_only: build a backbone that returns feature maps, with ``feature_info``.
        out_indices: which stages it returns, negative ones from the end, or the number of last
            ones; all by default.
        img_size: height and width of the images, or one number for both.
        in_chans: channels of the images.
        device: where the parameters go.
        dtype: their type.
        kwargs: the arguments of :class:`smlp.timm_network.TimmSMLPNet`.

    Raises:
        ValueError: if pretrained weights are asked for without a file, or a size or a stage does
            not fit.
    """
    overlay = pretrained_cfg_overlay or {}
    if pretrained and not overlay.get("file"):
        raise ValueError(
            f"pretrained: expected False, got {pretrained!r}: no weights come with smlp; "
            "smlp.load_checkpoint reads the published ones from a file, and so does "
            'pretrained_cfg_overlay={"file": path}'
        )
    network = TimmSMLPNet(image_size=img_size, in_channels=in_chans, **PUBLISHED[name] | kwargs)
    if pretrained:
        same_classes = overlay.get("num_classes", network.num_classes) == network.num_classes
        load_checkpoint(network, overlay["file"], classifier=same_classes)
    network.to(device=device, dtype=dtype)
    if not features_only:
        return network
    described = network.feature_info
    backbone = FeaturePyramid(network, network.stage_indices("out_indices", out_indices))
    backbone.feature_info = FeatureInfo(described, backbone.stages)
    return backbone
