"""Folding BatchNorm and residuals into the linear layers next to them, for inference.

In eval mode BatchNorm is ``a * x + s`` with a scale and a shift for each channel. Where ``f`` is
linear except for its biases, ``x + f(a * x + s)`` is ``x + f(a * x)`` without biases, which is one
linear step, plus the image ``f(s)``. So a block with ``F = [Fh | Fw | Fi]`` becomes a block with
``[Fh a | Fw a | Fi a + 1]`` and a bias for every pixel; a depthwise convolution likewise, with the
1 in the centre of its filters. The padding of a convolution is zero after the shift, so its bias
differs along borders.

All of it is computed in float64 and rounded once to the type of the parameters.

A folded part is computed from weights alone, so whatever else a module does would be lost: hooks,
further children, a patched ``forward``, pruned or parametrized weights. A part therefore folds only
if each of its modules differs from a new one in its weights alone.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from smlp.block import SMLPBlock, Unscripted, smlp
from smlp.smlpnet import SMLPNetLayer
from smlp.sparse_mlp import PreNormResidual

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FREE = {"training", "eps", "momentum", "affine", "track_running_stats"}  # settings that may differ
_ANY = nn.Module()  # in a pattern: nothing depends on it
Kind = TypeVar("Kind", bound=nn.Module)


class PlainFoldedSMLPBlock(Unscripted):
    """``x + block(norm(x))``, BatchNorm in eval mode, as one block on PyTorch's operators.

    Maps ``[B, C, H, W]`` of the type of its buffers to the same shape; nothing to train.

    Args:
        block: the block, plain or fused.
        norm: the BatchNorm before it, with running statistics.
    """

    weight_h: Tensor  # [H, H]
    weight_w: Tensor  # [W, W]
    weight_fuse: Tensor  # [C, 3C]
    bias: Tensor  # [C, H, W]

    @torch.no_grad()
    def __init__(self, block: SMLPBlock, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale, shift = _scale_and_shift(norm, block.height, block.width)
        exact = copy.deepcopy(block).double()
        fuse = exact.fuse.weight[:, :, 0, 0] * scale.repeat(3)
        fuse[:, -block.channels :].diagonal().add_(1)  # the residual
        dtype = block.fuse.weight.dtype
        self.register_buffer("weight_h", block.proj_h.weight.detach().clone())
        self.register_buffer("weight_w", block.proj_w.weight.detach().clone())
        self.register_buffer("weight_fuse", fuse.to(dtype))
        self.register_buffer("bias", _bias_map(SMLPBlock.forward(exact, shift), dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` of ``[B, C, H, W]``."""
        fuse = self.weight_fuse[:, :, None, None]
        y = smlp(x, self.weight_h, None, self.weight_w, None, fuse, None)
        return y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        channels, height, width = self.bias.shape
        return f"height={height}, width={width}, channels={channels}"


class FoldedDepthwise(nn.Module):
    """``x + conv(norm(x))``, a depthwise 3x3 convolution after BatchNorm in eval mode.

    Args:
        conv: the convolution, with stride 1 and zero padding of 1.
        norm: the BatchNorm before it, with running statistics.
        height: H of the input ``[B, C, H, W]``.
        width: W of the input.
    """

    weight: Tensor  # [C, 1, 3, 3]
    bias: Tensor  # [C, H, W]

    @torch.no_grad()
    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, height: int, width: int) -> None:
        super().__init__()
        scale, shift = _scale_and_shift(norm, height, width)
        exact = copy.deepcopy(conv).double()
        weight = exact.weight * scale[:, None, None, None]
        weight[:, 0, 1, 1] += 1  # the residual
        self.register_buffer("weight", weight.to(conv.weight.dtype))
        self.register_buffer("bias", _bias_map(exact(shift), conv.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, H, W]`` of ``[B, C, H, W]``."""
        y = F.conv2d(x, self.weight, padding=1, groups=self.weight.shape[0])
        return y + self.bias.to(y.dtype)


def _scale_and_shift(norm: nn.BatchNorm2d, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return scale ``[C]`` and shift ``[1, C, H, W]`` of BatchNorm in eval mode, in float64."""
    scale = (norm.get_buffer("running_var").double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.get_buffer("running_mean").double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift.expand(1, height, width, -1).movedim(3, 1)


def _bias_map(image: Tensor, dtype: torch.dtype) -> Tensor:
    """``[C, H, W]`` of ``[1, C, H, W]``, channels last, as an output is to which it is added."""
    return image.to(dtype).contiguous(memory_format=torch.channels_last)[0]


class Foldable(NamedTuple):
    """The result of :func:`foldable`."""

    parts: dict[str, nn.Module]  # by the name of what each takes the place of
    left: dict[str, str]  # by the name of what looked as if it would fold: why it does not


def foldable(
    model: nn.Module, folded_block: type[PlainFoldedSMLPBlock] = PlainFoldedSMLPBlock
) -> Foldable:
    """Find the parts of a network that fold, and compute their replacements; changes nothing.

    In a :class:`smlp.SparseMLP` both token-mixing steps of every layer become one step each. In an
    :class:`smlp.SMLPNet` the BatchNorm after each depthwise convolution goes into it; GELU stands
    between its other linear steps.

    Args:
        model: the network, in eval mode.
        folded_block: what computes ``x + block(norm(x))``.
    """
    found = Foldable({}, {})
    owners = Counter(id(part) for module in model.modules() for part in module._modules.values())
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, SMLPNetLayer):
            _fold_layer(module, prefix, owners, found)
        else:
            _fold_steps(module, prefix, folded_block, found)
    if isinstance(model, PreNormResidual):
        found.left["the model"] = "it is no part of another module, in which it could be replaced"
    return found


def _fold_steps(
    parent: nn.Module, prefix: str, folded_block: type[PlainFoldedSMLPBlock], found: Foldable
) -> None:
    """Add ``x + block(norm(x))`` among the children, and the ``x + conv(norm(x))`` before it."""
    steps: list[tuple[str, Any]] = [("", None), *parent._modules.items()]
    for (before, local), (child, step) in pairwise(steps):
        block = _first(SMLPBlock, step)
        if block is None:
            continue
        height, width, channels = block.height, block.width, block.channels
        build: Callable[[], nn.Module] = partial(SMLPBlock, height, width, channels)
        if reason := _step_difference(step, channels, build):
            found.left[prefix + child] = reason
            continue
        found.parts[prefix + child] = folded_block(block, step.norm)
        conv = _first(nn.Conv2d, local)
        if conv is None:
            continue
        # the size of its input is known only because the block's step follows
        reason = next(_class_differences(parent, nn.Sequential, "the module around it"), None)
        channels = conv.out_channels
        build = partial(nn.Conv2d, channels, channels, 3, padding=1, groups=channels)
        if reason := reason or _step_difference(local, channels, build):
            found.left[prefix + before] = reason
        else:
            found.parts[prefix + before] = FoldedDepthwise(conv, local.norm, height, width)


def _first(kind: type[Kind], step: nn.Module | None) -> Kind | None:
    """The first module of a kind inside a step ``x + fn(norm(x))``."""
    parts = step.modules() if isinstance(step, PreNormResidual) else ()
    return next((part for part in parts if isinstance(part, kind)), None)


def _step_difference(step: Any, channels: int, build: Callable[[], nn.Module]) -> str | None:
    """Say why a step may be something else than ``x + build()(norm(x))``; None if it is that."""
    with torch.device("meta"):
        function = build()
        if isinstance(step.fn, nn.Sequential):
            function = nn.Sequential(function)
        pattern = PreNormResidual(channels, function, norm=nn.BatchNorm2d)
    return next(_differences(step, pattern), None)


def _fold_layer(layer: Any, prefix: str, owners: Counter[int], found: Foldable) -> None:
    """Add the depthwise convolution of an SMLPNet's layer with the BatchNorm after it."""
    if reason := next(_layer_differences(layer, owners), None):
        found.left[prefix.removesuffix(".") or "the model"] = reason
        return
    conv, norm = layer.local.conv, layer.mix.norm
    folded = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    found.parts[f"{prefix}local.conv"] = folded.to(conv.weight.dtype)
    found.parts[f"{prefix}mix.norm"] = nn.Identity()


def _layer_differences(layer: Any, owners: Counter[int]) -> Iterator[str]:
    """Yield why the two may be something else."""
    yield from _class_differences(layer, SMLPNetLayer, "it")
    convs = (part for part in layer.modules() if isinstance(part, nn.Conv2d))
    channels = next((conv.out_channels for conv in convs), 1)
    with torch.device("meta"):
        pattern = SMLPNetLayer(1, 1, channels, expansion_factor=1, drop_rate=0.0)
    for name in ("local.norm", "local.activation", "mix.activation", "mix.block"):
        pattern.set_submodule(name, _ANY)
    for name in ("local", "mix"):
        yield from _differences(layer.get_submodule(name), pattern.get_submodule(name), name)
    for part, name in ((layer, "it"), (layer.local, "local"), (layer.mix, "mix")):
        if owners[id(part)] > 1:  # what is replaced inside would be replaced there, too
            yield f"{name} is used in several places"


def _class_differences(module: nn.Module, kind: type[nn.Module], name: str) -> Iterator[str]:
    """Yield why ``forward`` or another method may not be that of ``kind``."""
    own = type(module)
    if vars(own).get("plain_class", own) is not kind:  # that of a fused block
        yield f"{name} is a {own.__name__}"
    for key in vars(module):  # an attribute of the object hides the method of its class
        if callable(getattr(own, key, None)):
            yield f"{name} has a {key} that is not its class's"


def _differences(module: nn.Module, pattern: nn.Module, name: str = "") -> Iterator[str]:
    """Yield what a module is, holds or does that a new one, ``pattern``, does not.

    Only the first is sure to be one: those after it may follow from it.
    """
    if pattern is _ANY:
        return
    it = name or "it"
    yield from _class_differences(module, type(pattern), it)
    state, expected = vars(module), vars(pattern)
    if list(module._modules) != list(pattern._modules):
        held = ", ".join(module._modules) or "nothing"
        yield f"{it} holds {held}, not {' and '.join(pattern._modules) or 'no modules'}"
    if any(state[hooks] for hooks in _HOOKS):
        yield f"{it} has hooks"
    if module.training:
        yield f"{it} is in training mode (call model.eval() first)"
    weights = module._parameters | module._buffers
    if weights.keys() != (pattern._parameters | pattern._buffers).keys():
        yield f"{it} has pruned, parametrized or further weights"
    for weight in weights.values():
        if weight is not None and type(weight) not in (nn.Parameter, Tensor):
            yield f"{it} has weights of type {type(weight).__name__}"
    for key, value in expected.items():
        if not key.startswith("_") and key not in _FREE and state.get(key) != value:
            yield f"{it} has {key} {state.get(key)}, not {value}"
    if isinstance(module, nn.BatchNorm2d) and None in (module.running_mean, module.running_var):
        yield f"{it} keeps no running statistics"
    for child, part in pattern.named_children():
        path = f"{name}.{child}" if name else child
        yield from _differences(module.get_submodule(child), part, path)
