"""SMLPNet with the methods that timm's scripts and utilities call; does not need timm."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from smlp.layouts import from_paper_layout
from smlp.network import rate
from smlp.smlpnet import SMLPNet

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's colours
STD = (0.229, 0.224, 0.225)


class TimmSMLPNet(SMLPNet):
    """:class:`smlp.SMLPNet` in the manner of timm: same parameters and state dict, more methods.

    State dicts in the layout of the paper's code load as well, as from a file that timm reads.

    Args:
        num_classes: outputs of the head; with 0 it returns the features that they would see.
        drop_rate: probability of dropout before the classifier.
        global_pool: ``"avg"``, or empty to keep the feature map, for which num_classes has to be 0.
        arguments: of :class:`smlp.SMLPNet`.

    Raises:
        TypeError: as :class:`smlp.SMLPNet`.
        ValueError: as :class:`smlp.SMLPNet`, and for another ``global_pool`` or ``drop_rate``.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **arguments: Any,
    ) -> None:
        super().__init__(num_classes=num_classes or 1, **arguments)
        self.head_drop = nn.Dropout(rate("drop_rate", drop_rate))
        self.global_pool = "avg"
        if num_classes == 0 or global_pool != "avg":
            self.reset_classifier(num_classes, global_pool)
        self.register_load_state_dict_pre_hook(from_paper_layout)

    # --- description ---------------------------------------------------------------------------

    @property
    def num_features(self) -> int:
        """Channels of :meth:`forward_features`."""
        return self.channels[-1]

    @property
    def head_hidden_size(self) -> int:
        """Channels of the classifier's input."""
        return self.channels[-1]

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.in_channels

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and name of every stage's feature map."""
        return [
            {"num_chs": channels, "reduction": max(strides), "module": f"stages.{stage}"}
            for stage, (channels, strides) in enumerate(
                zip(self.channels, self.strides, strict=True)
            )
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The data that the network takes; of its present size, as :func:`smlp.resize` left it."""
        three = self.in_channels == 3
        return {
            **DEFAULT_CFG,
            "input_size": (self.in_channels, *self.image_size),
            "pool_size": self.sizes[-1],
            "num_classes": self.num_classes,
            "mean": MEAN if three else (0.5,) * self.in_channels,
            "std": STD if three else (0.5,) * self.in_channels,
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """As :attr:`pretrained_cfg`."""
        return self.pretrained_cfg

    # --- parameters ----------------------------------------------------------------------------

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return patterns that group parameters by depth, for rates that decay by layer."""
        layers = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stages\.0\.0", "blocks": layers}

    def no_weight_decay(self) -> set[str]:
        """Return the weights, besides biases and norms, that get no weight decay: none."""
        return set()

    def get_classifier(self) -> nn.Module:
        """Return the last layer: linear, or an identity."""
        return self.mlp_head.get_submodule("2")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one.

        Args:
            num_classes: its outputs; 0 for none.
            global_pool: as of the class; None leaves it.

        Raises:
            ValueError: if there are fewer than 0 outputs, or these need another ``global_pool``.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if num_classes < 0:
            raise ValueError(f"num_classes: expected at least 0, got {num_classes}")
        if pool not in (("avg",) if num_classes else ("avg", "")):
            raise ValueError(
                "global_pool: expected 'avg', or '' with num_classes=0, got "
                f"{pool!r} with num_classes={num_classes}"
            )
        like = next(self.parameters())
        layer: nn.Module = nn.Identity()
        if num_classes:
            layer = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            ).train(self.training)
        self.mlp_head.add_module("2", layer)
        self.num_classes, self.global_pool = num_classes, pool

    # --- forward -------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`smlp.SMLPNet.forward`; with ``num_classes=0`` as :meth:`forward_head`."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the last stage's feature map alone, as timm's models do.

        Args:
            x: ``[B, in_channels, *image_size]``, floating point.

        Returns:
            ``[B, num_features, *sizes[-1]]``, before the head's normalisation.
        """
        return self.feature_maps(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the feature map that :meth:`forward_features` returns.

        Args:
            x: ``[B, num_features, *sizes[-1]]``.
            pre_logits: whether to return what the classifier would see.

        Returns:
            ``[B, num_classes]``; ``[B, num_features]`` without the classifier, and the normalised
            map, of the shape of ``x``, without pooling.
        """
        norm, pool, classifier = self.mlp_head.children()
        x = norm(x)
        if self.global_pool:
            x = pool(x)
        x = self.head_drop(x)
        return x if pre_logits else classifier(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return feature maps of some stages, and that of the last one.

        Args:
            x: ``[B, in_channels, *image_size]``, floating point.
            indices: which stages, negative ones from the end, or the number of last ones; all by
                default.
            norm: whether to apply the head's normalisation to the last stage's map.
            stop_early: whether to stop after the last stage asked for.
            output_fmt: ``"NCHW"``; there is no other.
            intermediates_only: whether to return the list alone.

        Returns:
            The last map that was computed and the list of those asked for, ``[B, C, H, W]`` each.

        Raises:
            ValueError: if a stage does not exist, or another format is asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        wanted = self.stage_indices("indices", indices)
        count = max(wanted) + 1 if stop_early else len(self.depth)
        maps = self.feature_maps(x, count)
        normalise = self.mlp_head.get_submodule("0")
        taken = [
            normalise(maps[stage]) if norm and stage + 1 == len(self.depth) else maps[stage]
            for stage in wanted
        ]
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last one asked for, and the head, for use as a backbone.

        If stages are removed, so are normalisation and classifier, which are for the last one.

        Args:
            indices: which stages, as for :meth:`forward_intermediates`.
            prune_norm: whether to remove the head's normalisation too.
            prune_head: whether to remove the classifier.

        Returns:
            The stages asked for, counted from 0.
        """
        wanted = self.stage_indices("indices", indices)
        count = max(wanted) + 1
        shorter = count < len(self.depth)
        if prune_norm or shorter:
            self.mlp_head.add_module("0", nn.Identity())
        if prune_head or shorter:
            self.mlp_head.add_module("2", nn.Identity())
            self.num_classes = 0
        self.stages = self.stages[:count]
        self.depth, self.channels = self.depth[:count], self.channels[:count]
        return wanted

    def stage_indices(self, name: str, indices: int | Sequence[int] | None) -> list[int]:
        """Return the stages that an argument ``name`` asks for, counted from 0.

        Args:
            name: of the argument.
            indices: as for :meth:`forward_intermediates`.

        Raises:
            ValueError: if a stage does not exist, or none is asked for.
        """
        count = len(self.depth)
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            wanted = list(range(count - last, count))
        else:
            wanted = [i + count if i < 0 else i for i in indices]
        if not wanted or not all(0 <= stage < count for stage in wanted):
            raise ValueError(f"{name}: expected some of the {count} stages, got {indices!r}")
        return wanted


# What timm's registry holds of the networks; the rest is that of the paper.
DEFAULT_CFG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": (7, 7),
    "num_classes": 1000,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": MEAN,
    "std": STD,
    "first_conv": "stages.0.0",
    "classifier": "mlp_head.2",
}
