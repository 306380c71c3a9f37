"""The published sMLPNets in timm's registry: importing this module is what registers them.

::

    import timm
    import smlp.timm_models

    model = timm.create_model("smlpnet_tiny", num_classes=10)
    backbone = timm.create_model("smlpnet_tiny", features_only=True, out_indices=(1, 2, 3))

Needs the extra ``imagenet``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from smlp import smlpnet
from smlp.network import FeaturePyramid

try:
    from timm.data import IMAGENET_DEFAULT_MEAN as MEAN  # type: ignore[import-not-found,unused-ignore]
    from timm.data import IMAGENET_DEFAULT_STD as STD
    from timm.models import (  # type: ignore[import-not-found,unused-ignore]
        FeatureInfo,
        register_model,
    )
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
    raise ImportError(
        "smlp.timm_models needs a timm that can be imported beside the installed torch "
        f"{torch.__version__}: pip install torchvision timm (importing it failed: {error})"
    ) from error


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
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    **kwargs: Any,
) -> nn.Module:
    """Build a network from the arguments that ``timm.create_model`` hands on.

    Args:
        name: of the function in :mod:`smlp.smlpnet`.
        pretrained: must be off.
        pretrained_cfg: ignored, as the two below: there are no weights it could describe.
        pretrained_cfg_overlay: ignored.
        cache_dir: ignored.
        features_only: build a backbone that returns feature maps, with ``feature_info``.
        out_indices: which stages it returns, negative ones from the end; all by default.
        img_size: height and width of the images, or one number for both.
        in_chans: channels of the images.
        kwargs: the arguments of :class:`smlp.SMLPNet`.

    Raises:
        ValueError: if pretrained weights are asked for, or a size or a stage does not fit.
    """
    if pretrained:
        raise ValueError(
            f"pretrained: expected False, got {pretrained!r}: no weights come with smlp; "
            "smlp.load_checkpoint reads the published ones from a file"
        )
    network = getattr(smlpnet, name)(image_size=img_size, in_channels=in_chans, **kwargs)
    if not features_only:
        network.num_features = network.channels[-1]
        network.default_cfg = network.pretrained_cfg = _config(network)
        return network
    stages = range(len(network.depth))
    wanted = [i % len(stages) if i in range(-len(stages), 0) else i for i in out_indices or stages]
    backbone = FeaturePyramid(network, wanted)
    described = [
        {"num_chs": channels, "reduction": max(strides), "module": f"stages.{stage}"}
        for stage, (channels, strides) in enumerate(
            zip(network.channels, network.strides, strict=True)
        )
    ]
    backbone.feature_info = FeatureInfo(described, backbone.stages)
    return backbone


def _config(network: smlpnet.SMLPNet) -> dict[str, Any]:
    """What ``timm.data.resolve_model_data_config`` reads."""
    return {
        "input_size": (network.in_channels, *network.image_size),
        "fixed_input_size": True,
        "num_classes": network.num_classes,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "classifier": "mlp_head.2",
    }
