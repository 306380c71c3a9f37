"""The two registered operators, and why two are enough.

With ``fuse`` = [Fh | Fw | Fi] the block is

    mix(x):  y[b, :, h, w] = Fh (Ph x + bh)[b, :, h, w] + Fw (x Pw' + bw)[b, :, h, w]
                             + Fi x[b, :, h, w] + bias

It is linear in x and, with x fixed, bilinear in the projections and ``fuse``. So its input
gradient is ``mix`` again with views of the weights, all three matrices transposed; its weight
gradients are one more operator, ``mix_weight_grad``, and the derivatives of that one are both
operators again, with incoming gradients in the place of weights. Two operators serve derivatives
of every order.

Shapes: x and dy [B, C, H, W] with any strides; proj_h [H, H], bias_h [H], proj_w [W, W],
bias_w [W], fuse [C, 3C], [C, 3C, 1, 1] or [C, 3, C], bias [C] or [C, H, W], each in any floating
type: products are taken in the type of x and accumulated in float32 (float64 for float64). ``mix``
returns the type and the memory format of x. ``mix_weight_grad`` returns the gradients of proj_h,
bias_h, proj_w, bias_w, fuse and a bias [C], rounded once to the type of their weight, and empty
tensors in the place of those not needed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from smlp_kernels.launch import arch_of
from smlp_kernels.mix_launch import mix_calls
from smlp_kernels.weight_grad_launch import empty_grads, weight_grad_calls
from smlp_kernels.weights import Weights

Grads = tuple[Tensor | None, ...]

LIBRARY = torch.library.Library("smlp_kernels", "DEF")
LIBRARY.define(
    "mix(Tensor x, Tensor proj_h, Tensor? bias_h, Tensor proj_w, Tensor? bias_w, Tensor fuse, "
    "Tensor? bias) -> Tensor"
)
LIBRARY.define(
    "mix_weight_grad(Tensor dy, Tensor x, Tensor proj_h, Tensor? bias_h, Tensor proj_w, "
    "Tensor? bias_w, Tensor fuse, bool need_proj_h, bool need_proj_w, bool need_fuse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
mix = torch.ops.smlp_kernels.mix.default
mix_weight_grad = torch.ops.smlp_kernels.mix_weight_grad.default


def run_mix(x: Tensor, *weights: Any) -> Tensor:
    """Allocate and launch."""
    y = torch.empty_like(x)
    if x.numel():
        for call in mix_calls(x, Weights(*weights), y, arch_of(x)):
            call.run(x)
    return y


def run_mix_weight_grad(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Allocate and launch."""
    grads, calls = weight_grad_calls(*(dy, x, *rest, arch_of(x)))
    for call in calls:
        call.run(x)
    return grads


LIBRARY.impl("mix", run_mix, "CompositeExplicitAutograd")
LIBRARY.impl("mix_weight_grad", run_mix_weight_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("smlp_kernels::mix", lib=LIBRARY)
def _mix_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("smlp_kernels::mix_weight_grad", lib=LIBRARY)
def _mix_weight_grad_fake(
    dy: Tensor,
    x: Tensor,
    proj_h: Tensor,
    bias_h: Tensor | None,
    proj_w: Tensor,
    bias_w: Tensor | None,
    fuse: Tensor,
    need_proj_h: bool,
    need_proj_w: bool,
    need_fuse: bool,
) -> tuple[Tensor, ...]:
    return empty_grads(x, (proj_h, proj_w, fuse), (need_proj_h, need_proj_w, need_fuse))


def mix_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, proj_h, bias_h, proj_w, bias_w, fuse, bias = inputs
    ctx.bias_map_dtype = bias.dtype if bias is not None and bias.dim() == 3 else None
    weights_wanted = any(ctx.needs_input_grad[1:])
    # x is kept only for weight gradients; the weights are references, not copies
    ctx.save_for_backward(x if weights_wanted else None, proj_h, bias_h, proj_w, bias_w, fuse)


def mix_backward(ctx: Any, dy: Tensor) -> Grads:
    x, proj_h, bias_h, proj_w, bias_w, fuse = ctx.saved_tensors
    want = ctx.needs_input_grad
    dx = None
    if want[0]:
        weights = Weights(proj_h, bias_h, proj_w, bias_w, fuse, None)
        dx = Mix.call(dy, *weights.transposed())
    grads: Grads = (None,) * 6
    want_weights = (*want[1:6], want[6] and ctx.bias_map_dtype is None)
    if any(want_weights):
        grads = weight_grads(dy, x, (proj_h, bias_h, proj_w, bias_w, fuse), want_weights)
    if want[6] and ctx.bias_map_dtype is not None:
        grads = (*grads[:5], dy.sum(0, dtype=ctx.bias_map_dtype))
    return (dx, *grads)


def weight_grads(
    dy: Tensor, x: Tensor, weights: tuple[Any, ...], want: tuple[bool, ...]
) -> tuple[Any, ...]:
    """Gradients of ``weights`` (proj_h, bias_h, proj_w, bias_w, fuse) and a bias, or None."""
    need = (want[0] or want[1], want[2] or want[3], want[4] or want[5])
    grads = MixWeightGrad.call(dy, x, *weights, *need)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, want, strict=True))


def mix_weight_grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, need_proj_h, need_proj_w, need_fuse = inputs
    ctx.save_for_backward(*tensors)
    ctx.needed = (need_proj_h, need_proj_w, need_fuse)


def mix_weight_grad_backward(ctx: Any, *grads: Tensor | None) -> Grads:
    """With g the incoming gradients, sum <g, output> = <dy, A(x) + B(x)>, two mixes:

    A has the projections g_proj_h, g_bias_h, g_proj_w, g_bias_w, the fuse weight [Fh | Fw | 0] and
    the bias g_bias; B has the given projections and the fuse weight g_fuse.
    """
    dy, x, proj_h, bias_h, proj_w, bias_w, fuse = ctx.saved_tensors
    need_proj_h, need_proj_w, need_fuse = ctx.needed
    g_proj_h, g_bias_h = grads[:2] if need_proj_h else (None, None)
    g_proj_w, g_bias_w = grads[2:4] if need_proj_w else (None, None)
    g_fuse, g_bias = grads[4:] if need_fuse else (None, None)
    want_dy, want_x, *want_proj, want_fuse = ctx.needs_input_grad[:7]
    mixing_only = without_identity(fuse)
    a: Any = (
        torch.zeros_like(proj_h) if g_proj_h is None else g_proj_h,
        g_bias_h,
        torch.zeros_like(proj_w) if g_proj_w is None else g_proj_w,
        g_bias_w,
        mixing_only,
    )
    b: Any = (
        proj_h,
        bias_h,
        proj_w,
        bias_w,
        torch.zeros_like(fuse) if g_fuse is None else g_fuse,
    )
    d_dy = Mix.call(x, *a, g_bias) + Mix.call(x, *b, None) if want_dy else None
    d_x: Any = None
    if want_x:
        of_x = (Weights(*weights, None).transposed() for weights in (a, b))
        d_x = sum(Mix.call(dy, *weights) for weights in of_x)
    of_proj: Grads = (None,) * 6
    if g_fuse is not None:
        of_proj = weight_grads(dy, x, b, (*want_proj, False, False))
    d_fuse = None
    if want_fuse and (need_proj_h or need_proj_w):
        grads_of_a = weight_grads(dy, x, a, (False, False, False, False, True, False))
        d_fuse = without_identity(grads_of_a[4])
    return (d_dy, d_x, *of_proj[:4], d_fuse, None, None, None)


def without_identity(fuse: Tensor) -> Tensor:
    """[Fh | Fw | 0]."""
    mixing, identity = fuse.tensor_split([fuse.shape[1] * 2 // 3], dim=1)
    return torch.cat([mixing, torch.zeros_like(identity)], dim=1)


torch.library.register_autograd(
    "smlp_kernels::mix", mix_backward, setup_context=mix_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "smlp_kernels::mix_weight_grad",
    mix_weight_grad_backward,
    setup_context=mix_weight_grad_setup_context,
    lib=LIBRARY,
)


@torch.library.register_vmap("smlp_kernels::mix", lib=LIBRARY)
def _mix_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    x, *weights = arguments
    if any(dim is not None for dim in in_dims[1:]):  # weights of its own for each: one by one
        return torch.stack([mix(*one) for one in _each(info.batch_size, in_dims, arguments)]), 0
    x = x.movedim(in_dims[0], 0)
    return mix(x.flatten(0, 1), *weights).unflatten(0, x.shape[:2]), 0


@torch.library.register_vmap("smlp_kernels::mix_weight_grad", lib=LIBRARY)
def _mix_weight_grad_vmap(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = [mix_weight_grad(*one) for one in _each(info.batch_size, in_dims, arguments)]
    outputs = tuple(torch.stack(output) for output in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _each(
    size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Iterator[tuple[Any, ...]]:
    """The arguments of every element of a vmapped call."""
    for index in range(size):
        yield tuple(
            value if dim is None else value.select(dim, index)
            for value, dim in zip(arguments, in_dims, strict=True)
        )


# Of the formula, as PyTorch counts for the plain block; not of what the kernels compute anew.


@register_flop_formula(torch.ops.smlp_kernels.mix)
def _mix_flops(x: torch.Size, *_: object, out_shape: object) -> int:
    channels, height, width = x[1:]
    return 2 * x.numel() * (height + width + 3 * channels)


@register_flop_formula(torch.ops.smlp_kernels.mix_weight_grad)
def _mix_weight_grad_flops(dy: torch.Size, *arguments: Any, out_shape: object) -> int:
    channels, height, width = dy[1:]
    need_proj_h, need_proj_w, need_fuse = arguments[-3:]
    sums = need_proj_h * height + need_proj_w * width + need_fuse * 3 * channels
    return 2 * dy.numel() * sums


class Differentiable(torch.autograd.Function):
    """An operator with its autograd formula, for eager mode: the functions registered above.

    The dispatcher reaches the registered formula at a cost of about 30 us a call and
    ``Function.apply`` binds the arguments for 25 us, each as much as a kernel takes; the ``apply``
    of its base class does neither.
    """

    generate_vmap_rule = True

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """The operator, differentiable where gradients are recorded."""
        # a trace, too, is to hold the operator, whose formula is registered
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
            return cls.forward(*arguments)
        if functorch_is_active():  # its transforms live in the derived `apply`
            return cls.apply(*arguments)
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


class Mix(Differentiable):
    """``mix``."""

    forward = staticmethod(mix)
    setup_context = staticmethod(mix_setup_context)
    backward = staticmethod(mix_backward)


class MixWeightGrad(Differentiable):
    """``mix_weight_grad``."""

    forward = staticmethod(mix_weight_grad)
    setup_context = staticmethod(mix_weight_grad_setup_context)
    backward = staticmethod(mix_weight_grad_backward)


# Without this test of PyTorch's the slower `apply` is right everywhere.
functorch_is_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
