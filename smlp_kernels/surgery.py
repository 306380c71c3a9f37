"""``fuse_model`` and ``unfuse_model`` swap the blocks inside a model, in place."""

import logging

from torch import nn

from smlp import SMLPBlock
from smlp.folding import Foldable, foldable
from smlp.network import require_module
from smlp_kernels.folding import FoldedSMLPBlock
from smlp_kernels.modules import FusedSMLPBlock

logger = logging.getLogger(__name__)
logger.addHandler(logging.NullHandler())

_NAMED = 5  # of the parts that do not fold; the rest are counted


def fuse_model(model: nn.Module, *, fold: bool = False) -> int:
    """Swap every :class:`smlp.SMLPBlock` inside ``model`` for the fused block, in place.

    The modules stay the same objects: parameters, their sharing, hooks, the state dict and any
    optimizer keep working. Subclasses of ``SMLPBlock`` other than the fused block are left alone,
    because their ``forward`` may do something else, and blocks with a patched ``forward``.

    Args:
        model: any module; may itself be a block.
        fold: for inference with a :class:`smlp.SparseMLP` or :class:`smlp.SMLPNet`: first fold
            BatchNorm and residuals into the linear layers next to them, so that
            ``x + block(norm(x))`` is one call of the block (:mod:`smlp.folding`). Folded modules
            have new weights in buffers and cannot be unfused or trained: keep the original, or its
            state dict. A part with anything else in it (hooks, further modules, pruned weights) is
            not folded, only its block swapped; a warning names it and says why.

    Returns:
        The number of blocks swapped, including folded ones.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if there is nothing to swap, or with ``fold`` nothing that folds, as in a model
            in training mode; the model is left as it was.
    """
    require_module(model)
    found = foldable(model, FoldedSMLPBlock) if fold else Foldable({}, {})
    if fold and not found.parts:
        raise ValueError(
            "model: expected something that folds (fold=False swaps the blocks alone), got "
            f"{type(model).__name__} with {_described(found.left) or 'no part of a known kind'}"
        )
    for name, part in found.parts.items():
        model.set_submodule(name, part.eval())
    if found.left:
        logger.warning("parts left as they were, not folded: %s", _described(found.left))
    folded = sum(isinstance(part, FoldedSMLPBlock) for part in found.parts.values())
    return folded + _swap(model, SMLPBlock, FusedSMLPBlock, needed=not fold)


def _described(left: dict[str, str]) -> str:
    named = [f"{name}, as {reason}" for name, reason in list(left.items())[:_NAMED]]
    more = [f"{len(left) - _NAMED} more"] if len(left) > _NAMED else []
    return "; ".join(named + more)


def unfuse_model(model: nn.Module) -> int:
    """The reverse of :func:`fuse_model`: every fused block becomes the plain one, in place.

    Args, returns and errors as for :func:`fuse_model`.
    """
    require_module(model)
    return _swap(model, FusedSMLPBlock, SMLPBlock)


def _swap(
    model: nn.Module, old: type[SMLPBlock], new: type[SMLPBlock], *, needed: bool = True
) -> int:
    """The two classes differ in ``forward`` alone, so changing the class is the whole swap."""
    swaps = [(m, kind) for m in model.modules() if (kind := _swapped(m, old, new))]
    if needed and not swaps:
        raise ValueError(
            f"model: expected at least one {old.__name__} to swap, found none in "
            f"{type(model).__name__}"
        )
    for module, kind in swaps:
        module.__class__ = kind
    return len(swaps)


def _swapped(
    module: nn.Module, old: type[SMLPBlock], new: type[SMLPBlock]
) -> type[nn.Module] | None:
    """The class to swap for, or None if it is neither ``old`` nor derived from it by FSDP.

    ``fully_shard`` and its like derive a class with the same forward and other hooks.
    """
    kind = type(module)
    if "forward" in vars(module):  # patched: what is called there would stay the same
        return None
    if kind is old:
        return new
    wrapper, *others = kind.__bases__
    if (
        others != [old]
        or not wrapper.__module__.startswith("torch.distributed.")
        or kind.forward is not old.forward
    ):
        return None
    name = kind.__name__.replace(old.__name__, new.__name__)
    return type(name, (wrapper, new), dict(vars(kind)))
