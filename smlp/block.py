"""The sMLP block: the plain PyTorch reference that other implementations are compared with."""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

torch.fx.wrap("rearrange")  # a call in the graph: it asks for the shape


def smlp(
    x: Tensor,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_fuse: Tensor,
    bias_fuse: Tensor | None,
) -> Tensor:
    """Project along H, project along W, keep the identity, fuse by a 1x1 convolution.

    Section 3.2 of arXiv 2109.05422; see :class:`smlp.SMLPBlock` for the formula.

    Args:
        x: ``[B, C, H, W]``.
        weight_h: ``[H, H]``, out, in.
        bias_h: ``[H]`` or None.
        weight_w: ``[W, W]``, out, in.
        bias_w: ``[W]`` or None.
        weight_fuse: ``[C, 3C, 1, 1]``; columns in the order h, w, identity.
        bias_fuse: ``[C]`` or None.

    Returns:
        ``[B, C, H, W]``.
    """
    return mix_and_fuse(
        x,
        partial(F.linear, weight=weight_h, bias=bias_h),
        partial(F.linear, weight=weight_w, bias=bias_w),
        partial(F.conv2d, weight=weight_fuse, bias=bias_fuse),
    )


def mix_and_fuse(
    x: Tensor,
    proj_h: Callable[[Tensor], Tensor],
    proj_w: Callable[[Tensor], Tensor],
    fuse: Callable[[Tensor], Tensor],
) -> Tensor:
    """The block with any three functions: two along the last axis, and one over 3C channels."""
    x_h = proj_h(rearrange(x, "b c h w -> b c w h"))
    x_w = proj_w(x)
    # under autocast the projections have its type, in which the convolution then takes x as well
    identity = x.to(x_w.dtype)
    return fuse(torch.cat([rearrange(x_h, "b c w h -> b c h w"), x_w, identity], dim=1))


class Unscripted(nn.Module):
    """Base of modules that ``torch.jit.script`` cannot compile; its error says so in a sentence."""

    def __prepare_scriptable__(self) -> nn.Module:  # what torch.jit.script asks for first
        raise TypeError(
            f"obj: expected a module that torch.jit.script compiles, got {type(self).__name__}, "
            "whose checks and einops patterns TorchScript does not support; "
            "torch.jit.trace(model.eval(), images) records it, and so does torch.export.export"
        )


class AxisMixing(Unscripted):
    """Base of the blocks that mix pixels by linear layers along an axis, which fix its length.

    A subclass has one or both of them, called ``proj_h`` and ``proj_w``, of sizes H and W.

    Args:
        height: H, the number of rows of the input.
        width: W, the number of columns of the input.

    Raises:
        ValueError: if one is smaller than 1.
        TypeError: if one is not an integer.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = positive_int("height", height), positive_int("width", width)


class SMLPBlock(AxisMixing):
    """Sparse-MLP token mixing: project along H, project along W, keep the identity, fuse by 1x1.

    Section 3.2 of "Sparse MLP for Image Recognition: Is Self-Attention Really Necessary?"
    (arXiv 2109.05422)::

        x_h[b, c, h, w] = sum_k proj_h.weight[h, k] * x[b, c, k, w] + proj_h.bias[h]
        x_w[b, c, h, w] = sum_k proj_w.weight[w, k] * x[b, c, h, k] + proj_w.bias[w]
        out = fuse(concat(x_h, x_w, x))          # 1x1 convolution, 3C -> C

    A state dict loads from any of the published layouts: ``fuse.weight`` as ``[C, 3C]`` (a linear
    layer) or ``[C, 3C, 1, 1]`` (a convolution), and the paper's own, whose projections are 1x1
    convolutions with the names of the axes swapped and whose concatenation starts with identity.

    Args:
        height: H, the number of rows of the input; at least 1.
        width: W, the number of columns of the input; at least 1.
        channels: C, the number of channels of input and output; at least 1.
        fuse_bias: whether ``fuse`` has a bias, as in common PyTorch ports; the paper's has none.
        device: where the parameters are created.
        dtype: floating-point type of the parameters.

    Raises:
        ValueError: if a size is smaller than 1.
        TypeError: if a size is not an integer.
    """

    def __init__(
        self,
        height: int,
        width: int,
        channels: int,
        *,
        fuse_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(height, width)
        channels = self.channels = positive_int("channels", channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj_h = nn.Linear(self.height, self.height, **factory)
        self.proj_w = nn.Linear(self.width, self.width, **factory)
        self.fuse = nn.Conv2d(3 * channels, channels, kernel_size=1, bias=fuse_bias, **factory)
        self.register_load_state_dict_pre_hook(_accept_published_layouts)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a batch of feature maps.

        Args:
            x: ``[B, channels, height, width]``, with the dtype and device of the parameters (under
                autocast any floating-point dtype but float64, which is exempt); B may be 0.

        Returns:
            ``[B, channels, height, width]``.

        Raises:
            ValueError: if the shape or the device of ``x`` does not fit the block.
            TypeError: if ``x`` is not a dense floating-point tensor of the parameters' dtype.
        """
        parameter = next(self.fuse.parameters(), None)  # None: tensors in place of parameters
        # a parametrization computes the weight at every access
        weight = self.fuse.weight if parameter is None else parameter
        check_input(x, weight, (self.channels, self.height, self.width))
        return mix_and_fuse(x, self.proj_h, self.proj_w, self.fuse)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The parameters in the order in which :func:`smlp.block.smlp` takes them."""
        # looking up a module or a parameter as an attribute takes 0.6 us
        modules: dict[str, Any] = self._modules
        proj_h, proj_w, fuse = modules["proj_h"], modules["proj_w"], modules["fuse"]
        try:
            h, w, f = proj_h._parameters, proj_w._parameters, fuse._parameters
            return h["weight"], h["bias"], w["weight"], w["bias"], f["weight"], f["bias"]
        except KeyError:  # tensors in place of parameters
            return proj_h.weight, proj_h.bias, proj_w.weight, proj_w.bias, fuse.weight, fuse.bias

    def is_determined_by_weights(self) -> bool:
        """Whether :func:`smlp.block.smlp` of :meth:`weights` computes all that forward does.

        False if a submodule has hooks (pruning, the older weight normalisation) or was replaced by
        another module (an adapter): these have to be called.
        """
        modules: dict[str, Any] = self._modules
        proj_h, proj_w, fuse = modules["proj_h"], modules["proj_w"], modules["fuse"]
        return (
            computes_only(proj_h, nn.Linear)
            and computes_only(proj_w, nn.Linear)
            and computes_only(fuse, nn.Conv2d)
            and fuse.in_channels == 3 * fuse.out_channels == 3 * self.channels
            and fuse.kernel_size == fuse.stride == (1, 1)
            and fuse.padding == (0, 0)
            and fuse.groups == 1
        )

    def extra_repr(self) -> str:
        return f"height={self.height}, width={self.width}, channels={self.channels}"


def check_input(x: Tensor, weight: Tensor, size: tuple[int, int, int]) -> None:
    """Raise the errors that :meth:`SMLPBlock.forward` documents; ``size`` is C, H, W."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    require_dense("x", x)
    if x.shape[1:] != size:
        raise ValueError(f"x: expected shape [B, {', '.join(map(str, size))}], got {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(
            f"x: expected the parameters' device {weight.device}, got {x.device}; "
            "move one of them with .to()"
        )
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dtype != weight.dtype:
        require_autocast(x, weight)


def require_autocast(x: Tensor, weight: Tensor) -> None:
    """Raise a TypeError unless autocast brings ``x`` and ``weight`` to one dtype."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # an error to ask on meta
    if not autocast or torch.float64 in (x.dtype, weight.dtype):
        hint = (
            ", since float64 is exempt from autocast"
            if autocast
            else " or run under torch.autocast"
        )
        raise TypeError(
            f"x: expected the parameters' dtype {weight.dtype}, got {x.dtype}; "
            f"convert one of them with .to(){hint}"
        )


torch.fx.wrap("check_input")  # a call in the graph: it looks at values that have to be there


def positive_int(name: str, value: object) -> int:
    """Return ``value``, which must be an integer of at least 1; NumPy's count as well.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is smaller than 1.
    """
    number = as_integer(value)
    if number is None:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number


def as_integer(value: object) -> int | None:
    """``value`` if it is an integer, of Python or NumPy, else None."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # NumPy's arrays and booleans
        return None


def require_dense(name: str, tensor: Tensor) -> None:
    """Raise a TypeError for sparse, nested and other tensors that have no strides."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {layout}")


def computes_only(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does just what ``kind`` does with its weight and bias."""
    state, actual = module.__dict__, type(module)
    if actual is not kind:  # as a parametrized module is
        names = "forward", "_conv_forward"
        if any(getattr(actual, n, None) is not getattr(kind, n, None) for n in names):
            return False
    return (
        "forward" not in state
        and "_conv_forward" not in state
        and not state["_forward_pre_hooks"]
        and not state["_forward_hooks"]
        and not state["_backward_pre_hooks"]
        and not state["_backward_hooks"]
    )


def _accept_published_layouts(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Rewrite one block's entries of ``state_dict`` (load_state_dict's own copy) to our layout."""
    if not isinstance(module, SMLPBlock):
        raise TypeError(f"module: expected an SMLPBlock, got {type(module).__name__}")
    if f"{prefix}proh_w.weight" in state_dict:  # the paper's code, with its own spelling
        _from_paper(module, state_dict, prefix)
    fuse = state_dict.get(f"{prefix}fuse.weight")
    if isinstance(fuse, Tensor) and fuse.dim() == 2:
        state_dict[f"{prefix}fuse.weight"] = fuse[:, :, None, None]


def _from_paper(block: SMLPBlock, state_dict: dict[str, Any], prefix: str) -> None:
    """Map the paper's block: its ``proj_h`` mixes W, its ``proh_w`` mixes H, identity is first."""
    mixes_w = _pop(state_dict, f"{prefix}proj_h.")
    mixes_h = _pop(state_dict, f"{prefix}proh_w.")
    for ours, theirs in (("proj_h", mixes_h), ("proj_w", mixes_w)):
        for name, value in theirs.items():
            state_dict[f"{prefix}{ours}.{name}"] = as_matrix(value)
    fuse = state_dict.get(f"{prefix}fuse.weight")
    if isinstance(fuse, Tensor):
        state_dict[f"{prefix}fuse.weight"] = identity_last(fuse)
        if block.fuse.bias is not None and f"{prefix}fuse.bias" not in state_dict:
            state_dict[f"{prefix}fuse.bias"] = fuse.new_zeros(fuse.shape[0])


def as_matrix(weight: Any) -> Any:
    """Return ``[N, M]`` for the ``[N, M, 1, 1]`` of a 1x1 convolution; anything else unchanged."""
    return weight[:, :, 0, 0] if isinstance(weight, Tensor) and weight.dim() == 4 else weight


def identity_last(fuse: Tensor) -> Tensor:
    """Reorder the columns of the paper's ``fuse``, (identity, W, H), to ours, (H, W, identity).

    Args:
        fuse: ``[C, 3C, ...]``; returned unchanged if its columns are not three equal groups.
    """
    if fuse.dim() < 2 or fuse.shape[1] % 3:
        return fuse
    return torch.cat(fuse.chunk(3, dim=1)[::-1], dim=1)


def _pop(state_dict: dict[str, Any], prefix: str) -> Mapping[str, Any]:
    names = [name for name in state_dict if name.startswith(prefix)]
    return {name.removeprefix(prefix): state_dict.pop(name) for name in names}


class Rearrange(nn.Module):
    """einops' ``rearrange`` as a module; unlike einops' own, ``torch.fx`` can trace it.

    Args:
        pattern: of ``rearrange``.
        sizes: of axes in it.
    """

    def __init__(self, pattern: str, **sizes: int) -> None:
        super().__init__()
        self.pattern, self.sizes = pattern, sizes

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rearranged."""
        return rearrange(x, self.pattern, **self.sizes)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.pattern), *(f"{k}={v}" for k, v in self.sizes.items())])


class PixelMean(nn.Module):
    """The mean over all pixels.

    Args:
        axes: height and width among the axes of the input.
    """

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C]``."""
        return x.mean(self.axes)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.axes))
