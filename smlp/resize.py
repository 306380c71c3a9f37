"""Other image sizes: carrying the axis projections, which fix H and W, over to another grid."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from smlp.block import AxisMixing, computes_only, positive_int
from smlp.network import PyramidNetwork, Size, as_pair, stage_sizes

Network = TypeVar("Network", bound=PyramidNetwork)
Block = TypeVar("Block", bound=AxisMixing)


def resize(network: Network, image_size: Size) -> Network:
    """Return a copy of a network that takes images of another size.

    Every block is resized as by :func:`resize_block`; everything else does not depend on the size
    and is copied. The copy works at once on images scaled to the new size, and can be fine-tuned.
    Weights that two blocks share are shared in the copy.

    Args:
        network: a :class:`SparseMLP` or an :class:`SMLPNet`, with the blocks of this package in it,
            including those of :mod:`smlp.ablations`; it is not changed.
        image_size: height and width of the new images, or one number for both.

    Returns:
        The copy, with the parameters' dtypes and devices; it needs a new optimizer.

    Raises:
        TypeError: if ``network`` is none of ours, a projection has adapters, hooks or
            parametrizations (merge or remove them first), or the size is neither an integer nor a
            pair of them.
        ValueError: if the size does not divide as the network needs, or the network has a block of
            a size that none of its stages has, weights that are shared by two axes whose new sizes
            differ, or a part other than a projection that depends on the size (such as one that
            ``fuse_model(fold=True)`` folded), which would not run.
    """
    if not isinstance(network, PyramidNetwork):
        raise TypeError(
            f"network: expected a SparseMLP or an SMLPNet, got {type(network).__name__}; "
            "smlp.resize_block resizes a single block"
        )
    new_sizes = stage_sizes(image_size, network.patch_size, len(network.depth))
    target = dict(zip(network.sizes, new_sizes, strict=True))
    for name, block in _blocks(network):
        if (block.height, block.width) not in target:
            raise ValueError(
                f"network: expected blocks of the stages' sizes {network.sizes}, "
                f"got {block.height} x {block.width} in {name}"
            )
    sizes = _projection_sizes(network, target, "network")
    resized = copy.deepcopy(network)
    resized.image_size = as_pair("image_size", image_size)
    _resize_in_place(resized, sizes, target)
    failure = _failure(resized)
    if failure and not _failure(network):
        raise ValueError(
            "network: expected one whose size only projections fix, got a part that does not "
            f"run at {resized.image_size}: {failure}"
        )
    return resized


def resize_block(block: Block, height: int, width: int) -> Block:
    """Return a copy of a block for feature maps of another height and width.

    A projection is seen as acting on the cosine modes of an axis (the DCT-II, whose modes are the
    same functions of position on every grid). The modes that both grids have are mixed by the new
    projection exactly as by the old one; modes that only a finer grid has are mapped to zero, and
    pass through the identity branch alone. With Q [new, old] the orthonormal map between the two
    grids' modes, ``P' = Q P Q^T`` and ``b' = sqrt(new / old) Q b``. It follows that

    * a constant image has the same output as before, interpolated: the row sums of P are
      interpolated, and constant row sums stay exactly the same;
    * on a finer grid, ``block'(interpolate(x)) = interpolate(block(x))`` for every x, where
      interpolation is that of the cosine modes;
    * a projection that acts alike everywhere (a symmetric filter, mirrored at the border) still
      does, and the filter keeps its width relative to the image;
    * enlarging a block and going back restores it, and enlarging keeps the norm of P.

    Args:
        block: an :class:`SMLPBlock`, of any subclass, or a block of :mod:`smlp.ablations`; it is
            not changed.
        height: H of the new feature maps.
        width: W of the new feature maps.

    Returns:
        The copy, with the parameters' dtypes and devices.

    Raises:
        TypeError: if ``block`` is another module, a projection has adapters, hooks or
            parametrizations (merge or remove them first), or a size is not an integer.
        ValueError: if a size is smaller than 1, or two axes share weights but not the new size.
    """
    if not isinstance(block, AxisMixing):
        raise TypeError(f"block: expected an SMLPBlock, got {type(block).__name__}")
    size = positive_int("height", height), positive_int("width", width)
    target = {(block.height, block.width): size}
    sizes = _projection_sizes(block, target, "block")
    resized = copy.deepcopy(block)
    _resize_in_place(resized, sizes, target)
    return resized


def _blocks(model: nn.Module) -> Iterator[tuple[str, AxisMixing]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, AxisMixing))


def _projection_sizes(
    model: nn.Module, target: Mapping[tuple[int, int], tuple[int, int]], argument: str
) -> dict[str, int]:
    """Return the new size of every projection by its name, or raise where it cannot have one."""
    sizes: dict[str, int] = {}
    by_weight: dict[int, tuple[str, int]] = {}
    for path, block in _blocks(model):
        for child, size in zip(
            ("proj_h", "proj_w"), target[block.height, block.width], strict=True
        ):
            if child not in block._modules:  # an ablation
                continue
            name, module = f"{path}.{child}" if path else child, block.get_submodule(child)
            if type(module) is not nn.Linear or not computes_only(module, nn.Linear):
                raise TypeError(
                    f"{argument}: expected projections without adapters, hooks and "
                    f"parametrizations (merge or remove them first), got some on {name}, a "
                    f"{type(module).__name__}"
                )
            sizes[name] = size
            for weight in module.parameters():
                other, its_size = by_weight.setdefault(id(weight), (name, size))
                if its_size != size:
                    raise ValueError(
                        f"{argument}: expected projections that share weights to keep one size, "
                        f"got {its_size} for {other} and {size} for {name}"
                    )
    for path, module in model.named_modules():
        for entry, weight in module.named_parameters(recurse=False):
            name = f"{path}.{entry}" if path else entry
            if id(weight) in by_weight and path not in sizes:
                raise ValueError(
                    f"{argument}: expected weights of projections that only projections share, "
                    f"got one that is {name} too"
                )
    return sizes


def _resize_in_place(
    model: nn.Module,
    sizes: Mapping[str, int],
    target: Mapping[tuple[int, int], tuple[int, int]],
) -> None:
    """Give every projection its new size, and every block that it has it."""
    done: dict[int, nn.Parameter] = {}
    for name, size in sizes.items():
        projection = cast(nn.Linear, model.get_submodule(name))
        for entry, weight in list(projection.named_parameters()):
            if id(weight) not in done:
                new = _resized(weight, size)
                done |= {id(weight): new, id(new): new}
            projection.register_parameter(entry, done[id(weight)])
        projection.in_features = projection.out_features = size
    for _, block in list(_blocks(model)):
        block.height, block.width = target[block.height, block.width]


def _resized(weight: nn.Parameter, size: int) -> nn.Parameter:
    """Return ``[size, size]`` or ``[size]`` that acts on the shared modes as the given one does."""
    old = weight.shape[0]
    if old == size:
        return weight
    modes = _mode_map(old, size).to(weight.device)  # [size, old]
    exact = weight.detach().double()
    exact = math.sqrt(size / old) * (modes @ exact) if exact.dim() == 1 else modes @ exact @ modes.T
    return nn.Parameter(exact.to(weight.dtype), requires_grad=weight.requires_grad)


def _failure(network: PyramidNetwork) -> str:
    """Say which part does not run, and why; empty if all do. Nothing is computed."""
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        network = copy.deepcopy(network)  # without values
    running: list[str] = []
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(lambda *_: running.pop() and None)
    first = next(p for p in network.parameters() if p.is_floating_point())
    try:
        with torch.no_grad(), fake:
            shape = 2, network.in_channels, *network.image_size
            network(torch.empty(shape, dtype=first.dtype, device=first.device))
    except Exception as error:  # of whatever a part raises
        name = running[-1] if running else ""
        kind = type(network.get_submodule(name)).__name__
        return f"{name or 'the network'}, a {kind}: {error}"
    return ""


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
