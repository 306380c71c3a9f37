"""Which parts of a network fold: those that are known completely, and no others.

A folded part is computed from weights alone, so whatever else a module does would be lost: hooks,
further children, a patched ``forward``, pruned or parametrized weights. A part therefore folds only
if each of its modules is of exactly the expected type and holds exactly what that type holds.
"""

from collections import Counter
from typing import NamedTuple, TypeVar, cast

from torch import Tensor, nn

from smlp import SMLPBlock
from smlp.smlpnet import SMLPNetLayer
from smlp.sparse_mlp import PreNormResidual
from smlp_kernels.folding import FoldedDepthwise, FoldedSMLPBlock, convolution_then_norm
from smlp_kernels.modules import FusedSMLPBlock

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The parameters and buffers of each type; the others have none.
_WEIGHTS: dict[type[nn.Module], set[str]] = {
    nn.Linear: {"weight", "bias"},
    nn.Conv2d: {"weight", "bias"},
    nn.BatchNorm2d: {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
}

Kind = TypeVar("Kind", bound=nn.Module)


class Foldable(NamedTuple):
    """What :func:`foldable` found."""

    parts: dict[str, nn.Module]  # by the name of what each takes the place of
    left: dict[str, str]  # by the name of what looked as if it would fold: why it does not


class _Unknown(Exception):
    """The reason why a part does not fold."""


def foldable(model: nn.Module) -> Foldable:
    """Find the parts of a network that fold, and compute what takes their place; changes nothing.

    In a :class:`smlp.SparseMLP` both token-mixing steps of every layer become one step each. In an
    :class:`smlp.SMLPNet` the BatchNorm after each depthwise convolution goes into it; GELU stands
    between its other linear steps.
    """
    found = Foldable({}, {})
    owners = Counter(id(part) for module in model.modules() for part in module._modules.values())
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, SMLPNetLayer):
            try:
                parts = _folded_layer(module, owners)
            except _Unknown as reason:
                found.left[name or "the model"] = str(reason)
            else:
                found.parts.update({prefix + path: part for path, part in parts.items()})
        else:
            _fold_steps(module, prefix, found)
    if isinstance(model, PreNormResidual):
        found.left["the model"] = "it is no part of another module, in which it could be replaced"
    return found


def _fold_steps(parent: nn.Module, prefix: str, found: Foldable) -> None:
    """Add ``x + block(norm(x))`` among the children, and the ``x + conv(norm(x))`` before it."""
    before: tuple[str, nn.Module | None] = "", None
    for child, step in parent._modules.items():
        name, previous = prefix + child, before
        before = name, step
        if not isinstance(step, PreNormResidual) or not _holds(step, SMLPBlock):
            continue
        try:
            norm, block = _norm_and_block(step)
        except _Unknown as reason:
            found.left[name] = str(reason)
            continue
        found.parts[name] = FoldedSMLPBlock(block, norm)
        name, step = previous
        if not isinstance(step, PreNormResidual) or not _holds(step, nn.Conv2d):
            continue
        try:
            # the size of its input is known only because the block's step follows
            _require_type(parent, "the module around it", nn.Sequential)
            norm, conv = _norm_and_depthwise(step)
        except _Unknown as reason:
            found.left[name] = str(reason)
            continue
        found.parts[name] = FoldedDepthwise(conv, norm, block.height, block.width)


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())


def _norm_and_function(step: nn.Module) -> tuple[nn.BatchNorm2d, nn.Module, str]:
    """BatchNorm, what follows it and the name of that, in ``x + f(norm(x))``."""
    _known(step, "it", PreNormResidual, children=("fn", "norm"))
    function, name = step.get_submodule("fn"), "fn"
    if isinstance(function, nn.Sequential):
        _known(function, name, nn.Sequential, children=("0",))
        function, name = function[0], "fn.0"
    return _known_norm(step.get_submodule("norm"), "norm"), function, name


def _norm_and_block(step: nn.Module) -> tuple[nn.BatchNorm2d, SMLPBlock]:
    norm, function, name = _norm_and_function(step)
    children = "proj_h", "proj_w", "fuse"
    block = _known(function, name, SMLPBlock, FusedSMLPBlock, children=children)
    for child, kind in zip(children, (nn.Linear, nn.Linear, nn.Conv2d), strict=True):
        _known(block.get_submodule(child), f"{name}.{child}", kind)
    if not block.is_determined_by_weights() or norm.num_features != block.channels:
        raise _Unknown(f"the sizes of norm and {name} do not fit each other")
    return norm, block


def _norm_and_depthwise(step: nn.Module) -> tuple[nn.BatchNorm2d, nn.Conv2d]:
    norm, function, name = _norm_and_function(step)
    conv = _known(function, name, nn.Conv2d)
    if not (
        conv.groups == conv.in_channels == conv.out_channels == norm.num_features
        and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and (conv.padding, conv.padding_mode) == ((1, 1), "zeros")
    ):
        raise _Unknown(f"{name} is no depthwise 3x3 convolution with zeros around the image")
    return norm, conv


def _folded_layer(layer: SMLPNetLayer, owners: Counter[int]) -> dict[str, nn.Module]:
    """The depthwise convolution of an SMLPNet's layer with the BatchNorm after it."""
    _require_type(layer, "it", SMLPNetLayer)
    local = _known(layer.local, "local", nn.Sequential, children=("norm", "activation", "conv"))
    mix = _known(layer.mix, "mix", nn.Sequential, children=("norm", "activation", "block"))
    conv = _known(local.get_submodule("conv"), "local.conv", nn.Conv2d)
    norm = _known_norm(mix.get_submodule("norm"), "mix.norm")
    if conv.out_channels != norm.num_features:
        raise _Unknown("the sizes of local.conv and mix.norm do not fit each other")
    for part, name in ((layer, "it"), (local, "local"), (mix, "mix")):
        if owners[id(part)] > 1:  # what is replaced inside would be replaced there, too
            raise _Unknown(f"{name} is used in several places")
    return {"local.conv": convolution_then_norm(conv, norm), "mix.norm": nn.Identity()}


def _known_norm(module: nn.Module, name: str) -> nn.BatchNorm2d:
    norm = _known(module, name, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise _Unknown(f"{name} keeps no running statistics")
    return norm


def _require_type(module: nn.Module, name: str, *kinds: type[nn.Module]) -> None:
    """Raise the reason where ``forward`` or another method is not that of one of ``kinds``."""
    kind = type(module)
    if kind not in kinds:
        raise _Unknown(f"{name} is a {kind.__name__}")
    # an attribute of the object hides the method of its class
    patched = [key for key in vars(module) if callable(getattr(kind, key, None))]
    if patched:
        raise _Unknown(f"{name} has a {patched[0]} that is not its class's")


def _known(
    module: nn.Module, name: str, *kinds: type[Kind], children: tuple[str, ...] = ()
) -> Kind:
    """Return ``module``, of one of ``kinds``, or raise the reason why it may be something else.

    Args:
        module: part of what is to be folded.
        name: what the reason calls it.
        kinds: the types that are known.
        children: the names of its children.
    """
    _require_type(module, name, *kinds)
    if tuple(module._modules) != children:
        expected = " and ".join(children) or "no modules"
        raise _Unknown(f"{name} holds {', '.join(module._modules) or 'nothing'}, not {expected}")
    state = vars(module)
    if any(state[hook] for hook in _HOOKS):
        raise _Unknown(f"{name} has hooks")
    if module.training:
        raise _Unknown(f"{name} is in training mode (call model.eval() first)")
    weights = {**module._parameters, **module._buffers}
    if weights.keys() != _WEIGHTS.get(type(module), set()):
        raise _Unknown(f"{name} has pruned, parametrized or further weights")
    for weight in weights.values():
        if weight is not None and type(weight) not in (nn.Parameter, Tensor):
            raise _Unknown(f"{name} has weights of type {type(weight).__name__}")
    return cast(Kind, module)
