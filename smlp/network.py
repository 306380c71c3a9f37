"""What the networks share: sizes, the check of images, feature maps, and use as a backbone."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from numbers import Real
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from smlp.block import Unscripted, as_integer, positive_int, require_autocast

torch.fx.wrap("check_images")  # a call in the graph: it looks at values that have to be there

Size = int | Sequence[int]
"""One number for a square, or a (height, width) pair as a tuple or list."""


class PyramidNetwork(Unscripted):
    """Base of the networks: stages that halve the feature map and double its channels, then a head.

    A subclass builds its modules, with the layers of a stage in :class:`Layers`, and ``mlp_head``,
    and implements :meth:`run_stages`.

    Attributes:
        image_size: (height, width) of the images.
        patch_size: (height, width) of the patches.
        in_channels: channels of the images.
        num_classes: outputs of the head.
        depth: the number of layers of each stage.
        channels: the number of channels of each stage.
        expansion_factor: hidden channels of the channel MLPs per channel.

    Args:
        image_size: height and width of the images, or one number for both.
        patch_size: height and width of a patch, or one number for both.
        in_channels: channels of the images.
        num_classes: outputs of the head.
        d_model: channels of the first stage; each further stage has twice as many.
        depth: the number of layers of each stage.
        expansion_factor: hidden channels of the channel MLPs per channel.

    Raises:
        TypeError: if a size is neither an integer nor a pair of them.
        ValueError: if a size is smaller than 1, if the image does not divide into patches, or if
            the feature map cannot be halved between stages.
    """

    mlp_head: nn.Module

    def __init__(
        self,
        image_size: Size,
        patch_size: Size,
        in_channels: int,
        num_classes: int,
        d_model: int,
        depth: Sequence[int],
        expansion_factor: int,
    ) -> None:
        super().__init__()
        self.image_size = as_pair("image_size", image_size)
        self.patch_size = as_pair("patch_size", patch_size)
        self.in_channels = positive_int("in_channels", in_channels)
        self.num_classes = positive_int("num_classes", num_classes)
        self.depth = positive_ints("depth", depth)
        first = positive_int("d_model", d_model)
        self.channels = tuple(first << stage for stage in range(len(self.depth)))
        self.expansion_factor = positive_int("expansion_factor", expansion_factor)
        stage_sizes(self.image_size, self.patch_size, len(self.depth))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each stage's feature map."""
        return stage_sizes(self.image_size, self.patch_size, len(self.depth))

    @property
    def strides(self) -> list[tuple[int, int]]:
        """(vertical, horizontal) pixels of the image per pixel of each stage's feature map."""
        rows, columns = self.patch_size
        return [(rows << stage, columns << stage) for stage in range(len(self.depth))]

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: ``[B, in_channels, *image_size]``, floating point.

        Returns:
            Logits, ``[B, num_classes]``.

        Raises:
            TypeError: if ``x`` is not a floating-point tensor of the parameters' dtype (any such
                dtype under autocast).
            ValueError: if it has another shape.
        """
        return self.mlp_head(self.feature_maps(x)[-1])

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the feature map of every stage, finest first, before the head's normalisation.

        Args:
            x: ``[B, in_channels, *image_size]``, floating point.

        Returns:
            One ``[B, channels[s], *sizes[s]]`` per stage s.

        Raises:
            TypeError: if ``x`` is not a floating-point tensor of the parameters' dtype (any such
                dtype under autocast).
            ValueError: if it has another shape.
        """
        return self.feature_maps(x)

    def feature_maps(self, x: Tensor, stages: int | None = None) -> list[Tensor]:
        """As :meth:`forward_features`; if ``stages`` is given, only for so many first stages."""
        check_images(x, self.in_channels, self.image_size, next(self.parameters(), None))
        return self.run_stages(x, len(self.depth) if stages is None else stages)

    def run_stages(self, x: Tensor, stages: int) -> list[Tensor]:
        """Compute :meth:`feature_maps` of images that fit."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the layers' inputs for the backward pass, and recompute the rest there.

        Less memory for about a third more time; outputs, gradients and statistics stay the same.

        Args:
            enable: whether to do so.
        """
        for module in self.modules():
            if isinstance(module, Layers):
                module.grad_checkpointing = enable


class Layers(nn.Sequential):
    """A sequence that can keep the inputs of its modules alone, instead of all they compute.

    Attributes:
        grad_checkpointing: whether it does.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the modules one after the other."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return super().forward(x)
        for layer in self:
            options: dict[str, Any] = {"use_reentrant": False}
            if not torch.compiler.is_compiling():  # which changes buffers once by itself
                options["context_fn"] = partial(_forward_and_recompute, layer)
            x = checkpoint(layer, x, **options)
        return x


def _forward_and_recompute(
    layer: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _without_statistics(layer)


@contextlib.contextmanager
def _without_statistics(layer: nn.Module) -> Iterator[None]:
    """Let BatchNorm see the same batch a second time without counting it again."""
    norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class FeaturePyramid(Unscripted):
    """A network as a backbone: images in, the feature maps of some stages out.

    The network's head is removed from it, so that every parameter gets a gradient
    (DistributedDataParallel asks for that) unless it comes after the last map returned; what does
    is not computed.

    Attributes:
        channels: the number of channels of each returned map.
        strides: (vertical, horizontal) pixels of the image per pixel of each returned map.

    Args:
        network: the network, perhaps trained; it is kept, not copied.
        stages: which stages' maps to return, counted from 0; all by default.

    Raises:
        TypeError: if ``network`` is none of ours, or ``stages`` is not a tuple or list.
        ValueError: if a stage does not exist, or none is asked for.
    """

    def __init__(self, network: PyramidNetwork, stages: Sequence[int] | None = None) -> None:
        super().__init__()
        require_network(network)
        every = range(len(network.depth))
        self.stages = tuple(every) if stages is None else _entries("stages", stages, every)
        self.channels = [network.channels[stage] for stage in self.stages]
        self.strides = [network.strides[stage] for stage in self.stages]
        network.mlp_head = nn.Identity()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map ``[B, in_channels, *image_size]`` to one feature map per stage asked for.

        Raises:
            TypeError: if ``x`` is not a floating-point tensor of the parameters' dtype (any such
                dtype under autocast).
            ValueError: if it has another shape.
        """
        features = self.network.feature_maps(x, max(self.stages) + 1)
        return [features[stage] for stage in self.stages]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As :meth:`PyramidNetwork.set_grad_checkpointing`."""
        self.network.set_grad_checkpointing(enable)


def require_network(network: object) -> None:
    """Raise a TypeError if ``network`` is none of ours."""
    if not isinstance(network, PyramidNetwork):
        raise TypeError(
            f"network: expected a SparseMLP or an SMLPNet, got {type(network).__name__}"
        )


def require_module(model: nn.Module) -> None:
    """Raise a TypeError if ``model`` is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that data parallelism, ``AveragedModel`` or ``torch.compile`` wraps."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # of torch.compile, whose class is slow to import
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _is_sequence(values: object) -> bool:
    """Whether it is a tuple, a list or the like, such as NumPy or a configuration file has."""
    return hasattr(values, "__len__") and not isinstance(values, (str, bytes, Mapping, Set, Tensor))


def _entries(name: str, values: object, among: range) -> tuple[int, ...]:
    """Return a non-empty tuple or list of integers of ``among`` as a tuple.

    Raises:
        TypeError: if it is not a tuple or list.
        ValueError: if it is empty or has another entry.
    """
    if not _is_sequence(values):
        raise TypeError(f"{name}: expected a tuple or list of integers, got {values!r}")
    given = [as_integer(value) for value in cast(Iterable[object], values)]
    entries = tuple(value for value in given if value is not None and value in among)
    if not entries or len(entries) < len(given):
        raise ValueError(f"{name}: expected some of {among[0]} to {among[-1]}, got {values!r}")
    return entries


def positive_ints(name: str, values: object) -> tuple[int, ...]:
    """Return a non-empty tuple or list of positive integers as a tuple.

    Raises:
        TypeError: if it is not a tuple or list of integers.
        ValueError: if it is empty or an entry is smaller than 1.
    """
    if not _is_sequence(values):
        raise TypeError(f"{name}: expected a tuple or list of integers, got {values!r}")
    entries = tuple(cast(Iterable[object], values))
    if not entries:
        raise ValueError(f"{name}: expected at least one entry, got {values!r}")
    return tuple(positive_int(f"{name}[{i}]", value) for i, value in enumerate(entries))


def as_pair(name: str, value: Size) -> tuple[int, int]:
    """Return ``value`` as (height, width): a number stands for a square.

    Raises:
        TypeError: if it is neither an integer nor a tuple or list of integers.
        ValueError: if it does not have two entries, or one is smaller than 1.
    """
    if as_integer(value) is not None or not _is_sequence(value):
        side = positive_int(name, value)
        return side, side
    sides = positive_ints(name, value)
    if len(sides) != 2:
        raise ValueError(f"{name}: expected one integer or (height, width), got {value!r}")
    return sides[0], sides[1]


def rate(name: str, value: float) -> float:
    """Return ``value``, a probability in [0, 1).

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is outside.
    """
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def stage_sizes(image_size: Size, patch_size: Size, stages: int) -> list[tuple[int, int]]:
    """Return the (height, width) of every stage's feature map.

    The first stage has one pixel per patch; every further stage halves both axes.

    Raises:
        TypeError: if a size is neither an integer nor a pair of integers.
        ValueError: if a size is smaller than 1 or does not divide.
    """
    image, patch = as_pair("image_size", image_size), as_pair("patch_size", patch_size)
    step = 2 ** (stages - 1)
    for axis, size, cell in zip(("height", "width"), image, patch, strict=True):
        if size % (cell * step):
            raise ValueError(
                f"image_size: expected a {axis} divisible by {cell * step} "
                f"(patch {cell}, halved {stages - 1} times between {stages} stages), got {size}"
            )
    height, width = image[0] // patch[0], image[1] // patch[1]
    return [(height >> stage, width >> stage) for stage in range(stages)]


def check_images(
    x: Tensor, channels: int, size: tuple[int, int], weight: Tensor | None = None
) -> None:
    """Check a batch of images against what a network was built for.

    Args:
        x: the images.
        channels: of each.
        size: their height and width.
        weight: one of the network's weights, whose dtype the images must have; None for any.

    Raises:
        TypeError: if ``x`` is not a floating-point tensor of that dtype.
        ValueError: if its shape is not ``[B, channels, *size]``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, *size):
        expected = f"[B, {channels}, {size[0]}, {size[1]}]"
        hint = _shape_hint(tuple(x.shape), channels, size)
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}{hint}")
    if not torch.is_floating_point(x):
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if weight is None or x.dtype == weight.dtype or weight.dtype not in _COMPUTED:
        return
    if hasattr(weight, "full_tensor"):  # a shard, of a weight that may be used in another dtype
        return
    require_autocast(x, weight)


_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape_hint(shape: tuple[int, ...], channels: int, size: tuple[int, int]) -> str:
    """Say how images of another shape could be made to fit."""
    if shape == (channels, *size):
        return "; x.unsqueeze(0) makes a batch of one image"
    if shape == (*size, channels):
        return "; x.permute(2, 0, 1).unsqueeze(0) makes a batch of one image with channels last"
    if len(shape) == 4 and shape[1:] == (*size, channels):
        return "; x.permute(0, 3, 1, 2) puts the channels first"
    if len(shape) == 4 and shape[1] == channels:
        return "; smlp.resize adapts a model to another image size"
    return ""
