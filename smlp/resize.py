"""Other image sizes: carrying the axis projections, which fix H and W, over to another grid."""

import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smlp.block import SMLPBlock, computes_only
from smlp.network import PyramidNetwork
from smlp.sizes import Size, as_pair, positive_int, stage_sizes

Network = TypeVar("Network", bound=PyramidNetwork)


def resize(network: Network, image_size: Size) -> Network:
    """Return a copy of a network that takes images of another size.

    Every block is resized as :func:`resize_block` does; everything else depends on no size and is
    copied. The copy can be used as it is on images scaled to the new size, and fine-tuned.

    Args:
        network: a :class:`SparseMLP` or an :class:`SMLPNet`, with whichever blocks in it; left as
            it is.
        image_size: height and width of the new images, or one number for both.

    Returns:
        The copy, with the parameters' dtypes and devices; an optimizer has to be made anew for it.

    Raises:
        TypeError: if ``network`` is none of ours, a projection has adapters, hooks or
            parametrizations (merge or remove them first), or the size is no integer or pair of
            them.
        ValueError: if the size does not divide as the network needs, or the network has a block of
            a size that none of its stages has.
    """
    if not isinstance(network, PyramidNetwork):
        raise TypeError(
            f"network: expected a SparseMLP or an SMLPNet, got {type(network).__name__}; "
            "smlp.resize_block resizes a single block"
        )
    new_sizes = stage_sizes(image_size, network.patch_size, len(network.depth))
    target = dict(zip(network.sizes, new_sizes, strict=True))
    for name, block in network.named_modules():
        if not isinstance(block, SMLPBlock):
            continue
        if (block.height, block.width) not in target:
            raise ValueError(
                f"network: expected blocks of the stages' sizes {network.sizes}, "
                f"got {block.height} x {block.width} in {name}"
            )
        _require_plain_projections(block, "network", f"{name}.")
    resized = copy.deepcopy(network)
    resized.image_size = as_pair("image_size", image_size)
    for module in resized.modules():
        if isinstance(module, SMLPBlock):
            _resize_in_place(module, *target[module.height, module.width])
    return resized


def resize_block(block: SMLPBlock, height: int, width: int) -> SMLPBlock:
    """Return a copy of a block for feature maps of another height and width.

    A projection is taken to act on the cosine modes of an axis (the DCT-II, whose modes are the
    same functions of position on every grid). The modes that both grids have are mixed by the new
    projection exactly as by the old one; modes that only a finer grid has are mapped to zero, and
    pass through the identity branch alone. With Q [new, old] the orthonormal map between the two
    grids' modes, ``P' = Q P Q^T`` and ``b' = sqrt(new / old) Q b``. It follows that

    * a constant image is answered as before, interpolated: the row sums of P are interpolated, and
      constant row sums stay exactly what they are;
    * on a finer grid, ``block'(interpolate(x)) = interpolate(block(x))`` for every x, where
      interpolation is that of the cosine modes;
    * a projection that acts alike everywhere (a symmetric filter, mirrored at the border) still
      does, and the filter keeps its width relative to the image;
    * enlarging and going back gives the block back, and the norm of P is kept.

    Args:
        block: the block, of whichever subclass; left as it is.
        height: H of the new feature maps.
        width: W of the new feature maps.

    Returns:
        The copy, with the parameters' dtypes and devices.

    Raises:
        TypeError: if ``block`` is no :class:`SMLPBlock`, a projection has adapters, hooks or
            parametrizations (merge or remove them first), or a size is no integer.
        ValueError: if a size is smaller than 1.
    """
    if not isinstance(block, SMLPBlock):
        raise TypeError(f"block: expected an SMLPBlock, got {type(block).__name__}")
    positive_int("height", height)
    positive_int("width", width)
    _require_plain_projections(block, "block", "")
    resized = copy.deepcopy(block)
    _resize_in_place(resized, height, width)
    return resized


def _require_plain_projections(block: SMLPBlock, argument: str, prefix: str) -> None:
    """Raise a TypeError where a new projection would lose what a module does beside its weight."""
    for name in ("proj_h", "proj_w"):
        module = block.get_submodule(name)
        if type(module) is not nn.Linear or not computes_only(module, nn.Linear):
            raise TypeError(
                f"{argument}: expected projections without adapters, hooks and parametrizations "
                f"(merge or remove them first), got some on {prefix}{name}, a "
                f"{type(module).__name__}"
            )


def _resize_in_place(block: SMLPBlock, height: int, width: int) -> None:
    block.proj_h = _resized(block.proj_h, height)
    block.proj_w = _resized(block.proj_w, width)
    block.height, block.width = height, width


def _resized(projection: nn.Linear, size: int) -> nn.Linear:
    """Return an ``[size, size]`` projection that acts on the shared modes as the given one."""
    old = projection.in_features
    if size == old:
        return projection
    weight, bias = projection.weight, projection.bias
    modes = _mode_map(old, size).to(weight.device)  # [size, old]
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    new = nn.utils.skip_init(nn.Linear, size, size, bias=bias is not None, **factory)
    with torch.no_grad():
        new.weight.copy_(modes @ weight.double() @ modes.T)
        if bias is not None:
            new.bias.copy_(math.sqrt(size / old) * (modes @ bias.double()))
            new.bias.requires_grad_(bias.requires_grad)
    new.weight.requires_grad_(weight.requires_grad)
    return new.train(projection.training)


def _mode_map(old: int, new: int) -> Tensor:
    """Map a signal to the one with the same leading cosine modes on another grid.

    Returns:
        ``[new, old]``, fp64; its columns are orthonormal if ``new >= old``, else its rows.
    """
    shared = min(old, new)
    return _cosines(new)[:shared].T @ _cosines(old)[:shared]


def _cosines(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix, ``[size, size]`` in fp64; row k is the k-th mode."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    mode = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi * mode[:, None] * position) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    return cosines
