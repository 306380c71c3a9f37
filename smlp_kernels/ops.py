"""The two registered operators, and why two are enough.

With ``fuse`` = [Fh | Fw | Fi] the block is

    mix(x):  y[b, :, h, w] = Fh (Ph x + bh)[b, :, h, w] + Fw (x Pw' + bw)[b, :, h, w]
                             + Fi x[b, :, h, w] + bias

It is linear in x and, with x fixed, bilinear in the projections and ``fuse``. All its gradients
come from one more operator, ``mix_backward``; that of x alone is ``mix`` again, with views of the
weights in which all three matrices are transposed. For incoming gradients g of what
``mix_backward`` returns, sum <g, output> = <dy, Y> where Y is a sum of three calls of ``mix``,

    Y = mix(g_x; Ph, Pw, F, no bias) + mix(x; g_Ph, g_bh, g_Pw, g_bw, [Fh | Fw | 0], no bias)
        + mix(x; Ph, bh, Pw, bw, g_F, g_b)

so its derivative by dy is Y, and the others are again those of <dy, mix>. So two operators serve
derivatives of every order.

Shapes: x and dy [B, C, H, W] with any strides; weights as in :class:`smlp_kernels.weights.Weights`.
Products are taken in the type of x and accumulated in float32 (float64 for float64). ``mix``
returns the type and the memory format of x. ``mix_backward`` returns the gradients of x, in its
memory format, and of proj_h, bias_h, proj_w, bias_w, fuse and a bias [C], rounded once to the type
of their weight; in place of those not needed it returns empty tensors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import register_flop_formula

from smlp.block import smlp
from smlp_kernels import hopper
from smlp_kernels.kernels import backward
from smlp_kernels.kernels import mix as forward
from smlp_kernels.kernels.backward import Needed
from smlp_kernels.launch import HOPPER, Call, arch_of, on_device_of
from smlp_kernels.weights import Weights

Grads = tuple[Tensor | None, ...]

run_hopper: Callable[[Tensor, Weights], Tensor | None] | None = hopper.mix if HOPPER else None

LIBRARY = library.Library("smlp_kernels", "DEF")
LIBRARY.define(
    "mix(Tensor x, Tensor proj_h, Tensor? bias_h, Tensor proj_w, Tensor? bias_w, Tensor fuse, "
    "Tensor? bias) -> Tensor"
)
LIBRARY.define(
    "mix_backward(Tensor dy, Tensor x, Tensor proj_h, Tensor? bias_h, Tensor proj_w, "
    "Tensor? bias_w, Tensor fuse, bool need_x, bool need_proj_h, bool need_proj_w, "
    "bool need_fuse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
mix = torch.ops.smlp_kernels.mix.default
mix_backward = torch.ops.smlp_kernels.mix_backward.default


def run_mix(x: Tensor, *weights: Any) -> Tensor:
    """``mix``: allocate and launch."""
    arch = arch_of(x)
    with on_device_of(x):
        if arch == hopper.ARCH and run_hopper is not None:
            y = run_hopper(x, Weights(*weights))
            if y is not None:
                return y
        return forward.mix(x, weights, arch, Call.launch)


def split_arguments(arguments: tuple[Any, ...]) -> tuple[Weights, Needed]:
    """Those of ``mix_backward`` after dy and x."""
    return Weights(*(*arguments[:5], None)), Needed(*arguments[5:])


def run_mix_backward(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``mix_backward``: allocate and launch."""
    weights, needed = split_arguments(arguments)
    with on_device_of(x):
        return backward.mix_backward(dy, x, weights, needed, arch_of(x), Call.launch)


@library.register_fake("smlp_kernels::mix", lib=LIBRARY)
def _mix_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@library.register_fake("smlp_kernels::mix_backward", lib=LIBRARY)
def _mix_backward_fake(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return backward.empty_grads(x, *split_arguments(arguments))


def mix_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weights, bias = inputs
    ctx.bias_map_dtype = bias.dtype if bias is not None and bias.dim() == 3 else None
    # x is kept only for weight gradients; the weights are references, not copies
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, *weights)


def mix_grad(ctx: Any, dy: Tensor) -> Grads:
    x, *weights = ctx.saved_tensors
    *want, want_bias = ctx.needs_input_grad
    map_dtype = ctx.bias_map_dtype
    grads = wanted_grads(dy, x, weights, (*want, want_bias and map_dtype is None))
    if want_bias and map_dtype is not None:
        grads = (*grads[:6], dy.sum(0, dtype=map_dtype))
    return grads


def wanted_grads(
    dy: Tensor, x: Tensor | None, weights: Sequence[Any], want: tuple[bool, ...]
) -> Grads:
    """The gradients of <dy, mix(x; weights)> by x and the six weights that ``want`` asks for.

    The last weight, the bias, has no effect and need not be given.
    """
    needed = Needed(want[0], want[1] or want[2], want[3] or want[4], want[5] or want[6])
    if any(needed[1:]):
        grads = differentiable_mix_backward(dy, x, *weights[:5], *needed)
        if all(want):
            return grads
        return tuple(grad if wanted else None for grad, wanted in zip(grads, want, strict=True))
    # mix rounds once where mix_backward rounds twice, and its tiles need no room for gradients
    transposed = Weights(*(*weights[:5], None)).transposed()
    return (differentiable_mix(dy, *transposed) if needed.x else None, *(None,) * 6)


def mix_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.needed = Needed(*inputs[7:])


def mix_backward_grad(ctx: Any, *grads: Tensor | None) -> Grads:
    """The derivatives of the three terms of Y at the head of this file."""
    dy, x, *weights = ctx.saved_tensors
    proj_h, bias_h, proj_w, bias_w, fuse = weights
    want_dy, want_x, want_h, want_bias_h, want_w, want_bias_w, want_fuse = ctx.needs_input_grad[:7]
    wants = [ctx.needed.x, *[ctx.needed.proj_h] * 2, *[ctx.needed.proj_w] * 2, ctx.needed.fuse]
    given = [g if n else None for g, n in zip(grads, (*wants, ctx.needed.fuse), strict=True)]
    g_x, g_h, g_bias_h, g_w, g_bias_w, g_fuse, g_bias = given

    def zeros(of: Tensor, gradient: Tensor | None) -> Tensor:
        return torch.zeros_like(of) if gradient is None else gradient

    # what is mixed, by which weights, and the derivatives wanted: of it, the weights, the bias
    terms: list[tuple[Tensor, Weights, tuple[bool, ...]]] = []
    want: tuple[bool, ...]
    if g_x is not None:
        want = (False, want_h, False, want_w, False, want_fuse, False)
        terms.append((g_x, Weights(proj_h, None, proj_w, None, fuse, None), want))
    if any(g is not None for g in given[1:5]):
        mixing = Weights(
            zeros(proj_h, g_h), g_bias_h, zeros(proj_w, g_w), g_bias_w, without_identity(fuse), None
        )
        terms.append((x, mixing, (want_x, False, False, False, False, want_fuse, False)))
    if g_fuse is not None or g_bias is not None:
        fusing = Weights(proj_h, bias_h, proj_w, bias_w, zeros(fuse, g_fuse), g_bias)
        want = (want_x, want_h, want_bias_h, want_w, want_bias_w, False, False)
        terms.append((x, fusing, want))
    sums: list[Tensor | None] = [None] * 7
    for mixed, weights, want in terms:
        d_dy = differentiable_mix(mixed, *weights) if want_dy else None
        d_mixed, *d_weights, _ = wanted_grads(dy, mixed, weights, want)
        if d_weights[4] is not None and weights.fuse is not fuse:
            d_weights[4] = without_identity(d_weights[4])
        sums = list(map(plus, sums, (d_dy, d_mixed, *d_weights)))
    return (*sums, *(None,) * 4)


def plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def without_identity(fuse: Tensor) -> Tensor:
    """[Fh | Fw | 0]."""
    mixing, identity = fuse.tensor_split([fuse.shape[1] * 2 // 3], dim=1)
    return torch.cat([mixing, torch.zeros_like(identity)], dim=1)


@library.register_vmap("smlp_kernels::mix", lib=LIBRARY)
def _mix_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    x, *weights = arguments
    if any(dim is not None for dim in in_dims[1:]):
        return _one_by_one(mix, info, in_dims, *arguments)
    x = x.movedim(in_dims[0], 0)
    return mix(x.flatten(0, 1), *weights).unflatten(0, x.shape[:2]), 0


def _one_by_one(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """The outputs that vmap expects, stacked, if elements have different weights."""
    pairs = list(zip(arguments, in_dims, strict=True))
    results = [
        operator(*(value if dim is None else value.select(dim, index) for value, dim in pairs))
        for index in range(info.batch_size)
    ]
    stacked = tree_map(lambda *outputs: torch.stack(outputs), *results)  # a tensor or a tuple
    return stacked, tree_map(lambda _: 0, stacked)


library.register_vmap("smlp_kernels::mix_backward", partial(_one_by_one, mix_backward), lib=LIBRARY)


# FLOPs of the formula, as PyTorch counts the plain block, without what the kernels recompute.


@register_flop_formula(torch.ops.smlp_kernels.mix)
def _mix_flops(x: torch.Size, *_: object, out_shape: object) -> int:
    channels, height, width = x[1:]
    return 2 * x.numel() * (height + width + 3 * channels)


@register_flop_formula(torch.ops.smlp_kernels.mix_backward)
def _mix_backward_flops(dy: torch.Size, *arguments: Any, out_shape: object) -> int:
    channels, height, width = dy[1:]
    needed = Needed(*arguments[-4:])
    of_concat = needed.x or needed.proj_h or needed.proj_w
    terms = (of_concat + needed.fuse) * 3 * channels
    terms += (needed.x + needed.proj_h) * height + (needed.x + needed.proj_w) * width
    return 2 * dy.numel() * terms


def plain_mix(x: Tensor, *weights: Any) -> Tensor:
    """``mix`` by PyTorch's operators."""
    weight_h, bias_h, weight_w, bias_w, fuse, bias = weights
    fuse = fuse.reshape(fuse.shape[0], -1, 1, 1)
    has_map = bias is not None and bias.dim() != 1
    y = smlp(x, weight_h, bias_h, weight_w, bias_w, fuse, None if has_map else bias)
    return y + bias.to(y.dtype) if has_map else y


def plain_grads(dy: Tensor, x: Tensor, *arguments: Any) -> Grads:
    """All that ``mix_backward`` may return, by PyTorch's operators."""
    given = {i: t for i, t in enumerate((x, *arguments[:5])) if t is not None}
    pull = torch.func.vjp(lambda given: plain_mix(*map(given.get, range(7))), given)[1]
    (grads,) = pull(dy)
    return *map(grads.get, range(6)), dy.sum((0, 2, 3))


def differentiable(
    name: str, run: Callable[..., Any], setup_context: Any, gradient: Any, by_pytorch: Any
) -> Callable[..., Any]:
    """Register what an operator does, and return the operator for eager mode.

    In eager mode the dispatcher takes about 30 us to reach the registered formula, and
    ``Function.apply`` 25 us to bind the arguments, each as long as a kernel; the ``apply`` of its
    base class does neither.
    """
    operator = getattr(torch.ops.smlp_kernels, name).default
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    library.register_autograd(
        f"smlp_kernels::{name}", gradient, setup_context=setup_context, lib=LIBRARY
    )
    formula = {
        "generate_vmap_rule": True,
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(gradient),
    }
    bases = (torch.autograd.Function,)
    transformed: Any = type(name, bases, {**formula, "forward": staticmethod(operator)})
    direct: Any = type(name, bases, {**formula, "forward": staticmethod(run)})
    apply_direct = super(torch.autograd.Function, direct).apply

    def call(*arguments: Any, plain: bool | None = None) -> Any:
        if forward_ad._current_level >= 0:  # perhaps only since the forward
            dtype = arguments[0].dtype
            return by_pytorch(*(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments))
        if is_plain(arguments[:7]) if plain is None else plain:  # the tensors of either operator
            return (apply_direct if torch.is_grad_enabled() else run)(*arguments)
        if not is_traced() and functorch_is_active() and torch.is_grad_enabled():
            return transformed.apply(*arguments)  # the transforms live in the derived `apply`
        return operator(*arguments)

    return call


differentiable_mix = differentiable("mix", run_mix, mix_setup_context, mix_grad, plain_mix)
differentiable_mix_backward = differentiable(
    "mix_backward", run_mix_backward, mix_backward_setup_context, mix_backward_grad, plain_grads
)


def is_traced() -> bool:
    """Whether a graph is being recorded."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether the dispatcher would do nothing for an operator but call the function above.

    True if no mode is active and the memory of every tensor holds its values.
    """
    if is_traced() or functorch_is_active() or dispatch_modes() or tensors[0].is_meta:
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Parameter:
            if tensor.is_neg():
                return False
        elif kind is Tensor:
            if tensor.is_neg() or tensor._is_zerotensor() or not has_storage(tensor):
                return False
        elif tensor is not None:
            return False
    return True


# If PyTorch lacks these, the slower way is taken, which is always right.
has_storage: Callable[[Tensor], bool] = getattr(torch._C, "_has_storage", lambda _: False)
functorch_is_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
