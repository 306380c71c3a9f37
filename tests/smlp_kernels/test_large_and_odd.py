"""Sizes at the edge of a launch, inputs that overlap, and blocks used in unusual ways."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from smlp.testing import EPS, NAMES, assert_close, formula, to_float64
from smlp_kernels import FusedSMLPBlock, fused_smlp
from smlp_kernels.functional import MAX_CHANNELS, MAX_SIZE
from smlp_kernels.kernels.axis import matrix_columns
from smlp_kernels.launch import INT32_MAX
from tests.smlp_kernels.oracle import DEVICE, Case


def test_offsets_inside_an_image_fit_31_bits() -> None:
    """What the axis kernels, which take rows of a few images, count on."""
    assert MAX_SIZE**2 * matrix_columns(MAX_CHANNELS) <= INT32_MAX


# H, W or C of 1, one image, primes: sizes at which strides and tiles degenerate.
DEGENERATE = [Case(1, 1, 5, 3), Case(2, 7, 1, 2), Case(3, 1, 1, 5), Case(1, 11, 3, 1)]


@pytest.mark.parametrize("case", DEGENERATE, ids=str)
def test_degenerate_sizes(case: Case) -> None:
    arguments = [a.requires_grad_() for a in case.arguments(torch.float64, "contiguous")]
    assert_like_the_formula(arguments, case.arguments(torch.float64, seed=1)[0])


def assert_like_the_formula(arguments: list[Tensor], dy: Tensor) -> None:
    """Output and all gradients that are wanted, in float64."""
    exact_arguments = to_float64(arguments)
    exact = formula(*exact_arguments)
    actual = fused_smlp(*arguments)
    assert_close(actual, exact, None, eps=EPS[torch.float64])
    wanted = [n for n, a in zip(NAMES, arguments, strict=True) if a.requires_grad]
    grads, exact_grads = (
        torch.autograd.grad(y, [a for a in args if a.requires_grad], dy)
        for y, args in ((actual, arguments), (exact, exact_arguments))
    )
    for name, a, e in zip(wanted, grads, exact_grads, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


OVERLAPPING = {
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded pixels": lambda x: x[..., :1].expand(-1, -1, -1, 6),
    "overlapping windows": lambda x: x.flatten().as_strided((3, 4, 5, 6), (9, 2, 7, 3)),
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_gradients_of_overlapping_inputs(kind: str) -> None:
    """The elements that share memory share a gradient: autograd adds up what the block returns."""
    base, *weights = Case(3, 5, 6, 4).arguments(torch.float64, "contiguous")
    dy = Case(3, 5, 6, 4).arguments(torch.float64, seed=1)[0]
    results = []
    for block in (fused_smlp, formula):
        leaves = [a.clone().requires_grad_() for a in (base, *weights)]
        y = block(OVERLAPPING[kind](leaves[0]), *leaves[1:])
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for name, a, e in zip(("output", *NAMES), *results, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


def test_input_without_gradient() -> None:
    """The first block of a network: only its weights learn."""
    case = Case(2, 5, 6, 4)
    x, *weights = case.arguments(torch.float64)
    arguments = [x, *(w.requires_grad_() for w in weights)]
    assert_like_the_formula(arguments, case.arguments(torch.float64, seed=1)[0])


def test_weights_tied_between_blocks_and_between_axes() -> None:
    size, channels = 4, 3
    first = FusedSMLPBlock(size, size, channels, dtype=torch.float64, device=DEVICE)
    second = FusedSMLPBlock(size, size, channels, dtype=torch.float64, device=DEVICE)
    second.proj_h = first.proj_h
    first.proj_w = first.proj_h  # one matrix for both axes
    second.fuse.weight = first.fuse.weight
    model = nn.Sequential(first, second)
    x = Case(2, size, size, channels).arguments(torch.float64)[0]
    model(x).square().sum().backward()

    exact = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    by_id = {id(p): exact[name] for name, p in model.named_parameters()}
    y = x
    for block in model:
        y = formula(y, *(by_id[id(w)] for w in block.weights()))
    y.square().sum().backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, exact[name].grad, None, eps=EPS[torch.float64], name=name)


def test_ensemble_of_weights_by_vmap() -> None:
    case = Case(2, 3, 4, 2)
    members = [case.arguments(torch.float64, seed=seed) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*members, strict=True)]
    expected = torch.stack([formula(*member) for member in members])
    assert_close(torch.func.vmap(fused_smlp)(*stacked), expected, None, eps=EPS[torch.float64])


def test_nested_vmap() -> None:
    x, *weights = Case(4, 3, 4, 2).arguments(torch.float64)
    expected = formula(x, *weights).unflatten(0, (2, 2, 1))
    nested = torch.func.vmap(torch.func.vmap(lambda image: fused_smlp(image, *weights)))
    assert_close(nested(x.unflatten(0, (2, 2, 1))), expected, None, eps=EPS[torch.float64])


def test_jacobian_and_hessian_in_reverse_mode() -> None:
    arguments = Case(1, 2, 3, 2).arguments(torch.float64)

    def jacobian(block) -> Tensor:
        return torch.func.jacrev(lambda x: block(x, *arguments[1:]))(arguments[0])

    def hessian(block) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            return block(arguments[0], weight, *arguments[2:]).pow(3).sum()

        return torch.func.jacrev(torch.func.jacrev(loss))(arguments[1])

    assert_close(jacobian(fused_smlp), jacobian(formula), None, eps=EPS[torch.float64])
    assert_close(hessian(fused_smlp), hessian(formula), None, eps=EPS[torch.float64])


def test_forward_mode() -> None:
    arguments = Case(1, 2, 3, 2).arguments(torch.float64)
    tangents = tuple(Case(1, 2, 3, 2).arguments(torch.float64, seed=1))
    (_, actual), (_, exact) = (
        torch.func.jvp(block, tuple(arguments), tangents) for block in (fused_smlp, formula)
    )
    assert_close(actual, exact, None, eps=EPS[torch.float64])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[0], tangents[0])
        actual = forward_ad.unpack_dual(fused_smlp(dual, *arguments[1:])).tangent
    exact = formula(tangents[0], *arguments[1:]) - formula(0 * tangents[0], *arguments[1:])
    assert_close(actual, exact, None, eps=EPS[torch.float64])


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_of_a_backward(frozen: bool) -> None:
    """Of a graph from outside: what is backpropagated has a tangent, as linear as the backward."""
    results = []
    for block in (fused_smlp, formula):
        arguments = Case(2, 2, 3, 2).arguments(torch.float64, "contiguous")
        leaves = [a.requires_grad_() for a in (arguments[:1] if frozen else arguments)]
        y = block(*arguments)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), leaves[0], create_graph=True)
        dy, tangent = (Case(2, 2, 3, 2).arguments(torch.float64, seed=s)[0] for s in (1, 2))
        for of in (y, dx):
            gradients = partial(torch.autograd.grad, of, leaves, retain_graph=True)
            if block is formula:
                results.append(gradients(tangent))
                continue
            with forward_ad.dual_level():
                duals = gradients(forward_ad.make_dual(dy, tangent))
                results.append([forward_ad.unpack_dual(dual).tangent for dual in duals])
            assert_same(torch.func.jvp(gradients, (dy,), (tangent,))[1], results[-1])
    for actual, exact in zip(results[:2], results[2:], strict=True):
        assert_same(actual, exact)


def assert_same(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for a, e in zip(actual, exact, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], reduction=24)


def test_hessian_in_mixed_mode() -> None:
    arguments = Case(1, 2, 3, 2).arguments(torch.float64)

    def hessian(block) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            return block(arguments[0], weight, *arguments[2:]).pow(3).sum()

        return torch.func.hessian(loss)(arguments[1])

    assert_close(hessian(fused_smlp), hessian(formula), None, eps=EPS[torch.float64])


@pytest.mark.parametrize("argument", range(7))
def test_negative_views(argument: int) -> None:
    """The imaginary part of a conjugate: memory holds the numbers with the other sign."""
    arguments = Case(2, 3, 4, 2).arguments(torch.float64)
    exact = formula(*arguments)
    value = arguments[argument]
    arguments[argument] = torch.complex(torch.zeros_like(value), -value).conj().imag
    assert arguments[argument].is_neg()
    assert_close(fused_smlp(*arguments), exact, None, eps=EPS[torch.float64])


@pytest.mark.parametrize("argument", range(8))
def test_gradients_of_negative_views(argument: int) -> None:
    """The last of them is the incoming gradient."""
    tensors = Case(2, 3, 4, 2).arguments(torch.float64)
    tensors.append(Case(2, 3, 4, 2).arguments(torch.float64, seed=1)[0])
    results = []
    for negative in (False, True):
        if negative:
            value = tensors[argument].detach()
            tensors[argument] = torch.complex(torch.zeros_like(value), -value).conj().imag
            assert tensors[argument].is_neg()
        *leaves, dy = [t.detach().requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(fused_smlp(*leaves), leaves, dy))
    for name, a, e in zip(NAMES, *results, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


def test_gradient_that_is_no_memory() -> None:
    """Autograd hands on zeros without storage."""
    arguments = [a.requires_grad_() for a in Case(2, 3, 4, 2).arguments(torch.float64)]
    y = fused_smlp(*arguments)
    zeros = torch._efficientzerotensor(y.shape, dtype=y.dtype, device=DEVICE)
    for gradient, argument in zip(torch.autograd.grad(y, arguments, zeros), arguments, strict=True):
        assert gradient.shape == argument.shape and bool((gradient == 0).all())


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    arguments = [a.requires_grad_() for a in Case(2, 3, 4, 2).arguments(torch.float64)]
    exact_arguments = to_float64(arguments)

    def pack(tensor: Tensor) -> object:
        return tensor.detach().cpu().numpy().copy()

    def unpack(array: object) -> Tensor:
        return torch.from_numpy(array).to(DEVICE)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = fused_smlp(*arguments)
    y.square().sum().backward()
    formula(*exact_arguments).square().sum().backward()
    for actual, exact in zip(arguments, exact_arguments, strict=True):
        assert_close(actual.grad, exact.grad, None, eps=EPS[torch.float64], reduction=24)
