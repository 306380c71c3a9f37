"""Every gradient, of first and second order, against the formula in float64."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from smlp.block import smlp
from smlp.testing import EPS, NAMES, assert_close, formula, to_float64
from smlp_kernels import fused_smlp, launch, ops
from smlp_kernels.functional import MAX_CHANNELS, MAX_SIZE
from smlp_kernels.kernels import axis, backward, rows
from smlp_kernels.weights import Weights
from tests.smlp_kernels.oracle import DEVICE, Case
from tools.aot_report import STAGES

Block = Callable[..., Tensor]
CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 5, 7),
    Case(5, 7, 7, 20),
    Case(2, 14, 14, 33),
    Case(1, 13, 11, 17, bias=False),
    Case(1, 70, 9, 3),
    Case(2, 5, 66, 3),
    Case(1, 3, 140, 2),  # no tile of any type holds this axis
    Case(9, 4, 2, 70),
]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
# How a gradient may come back: each turns an output into a scalar, or what a loss is made of.
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),  # expanded: every stride is 0
    "square": lambda y: y.square().sum(),
    "cat": lambda y: torch.cat([y, 2 * y], dim=1).square().sum(),  # a slice of a larger gradient
    "every second": lambda y: y[..., ::2].square().sum(),
    "expand": lambda y: y.mean((2, 3), keepdim=True).expand_as(y).square().sum(),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last).square().sum(),
    "contiguous": lambda y: y.contiguous().square().sum(),
    "transpose": lambda y: (y.transpose(2, 3).contiguous().square()).sum(),
}


def wanting(arguments: list[Tensor | None], names: tuple[str, ...] = NAMES) -> list[Tensor | None]:
    for name, argument in zip(NAMES, arguments, strict=True):
        if argument is not None:
            argument.requires_grad_(name in names)
    return arguments


def gradients(block: Block, arguments: list[Tensor | None], dy: Tensor) -> list[Tensor]:
    wanted = [a for a in arguments if a is not None and a.requires_grad]
    return list(torch.autograd.grad(block(*arguments), wanted, dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    arguments = wanting(case.arguments(dtype))
    dy = case.arguments(dtype, seed=1)[0]
    exact = gradients(formula, to_float64(arguments), dy.double())
    peer = gradients(smlp, arguments, dy)
    actual = gradients(fused_smlp, arguments, dy)
    names = [n for n, a in zip(NAMES, arguments, strict=True) if a is not None]
    for name, a, e, p in zip(names, actual, exact, peer, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, p, eps=EPS[dtype], name=name, reduction=case.reduction(name))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "bordered", "transposed"])
@pytest.mark.parametrize("use", USES)
def test_layouts_of_gradients(use: str, layout: str) -> None:
    arguments = wanting(Case(2, 5, 6, 7).arguments(torch.float64, layout))
    exact_arguments = to_float64(arguments)
    exact = torch.autograd.grad(USES[use](formula(*exact_arguments)), exact_arguments)
    actual = torch.autograd.grad(USES[use](fused_smlp(*arguments)), arguments)
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


@pytest.mark.parametrize(
    "names",
    [(name,) for name in NAMES] + [("x", "weight_fuse"), ("weight_h", "bias_w"), NAMES[1:]],
    ids="+".join,
)
def test_only_what_is_asked_for(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    original = launch.Call.launch

    def record(call: launch.Call) -> None:
        along_h = call.plan.constants.get("ALONG_H")
        launched.append((call.plan.kernel.__name__, along_h))
        original(call)

    arguments = wanting(Case(2, 5, 6, 7).arguments(torch.float64), names)
    dy = Case(2, 5, 6, 7).arguments(torch.float64, seed=1)[0]
    exact = gradients(formula, to_float64(arguments), dy)
    y = fused_smlp(*arguments)
    monkeypatch.setattr(launch.Call, "launch", record)
    actual = torch.autograd.grad(y, [a for a in arguments if a.requires_grad], dy)
    for name, a, e in zip(names, actual, exact, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)
    if names == ("x",):
        assert launched == [("axes_kernel", None)]
        return
    both = "x" in names or any("fuse" in name for name in names)
    if all("fuse" in name for name in names):  # what it needs is what a forward does
        assert launched == [("axes_kernel", None), ("weight_sums_kernel", None)]
        return
    expected = {
        ("axes_kernel", True): both or any(name.endswith("_h") for name in names),
        ("axes_kernel", False): both or any(name.endswith("_w") for name in names),
        ("weight_sums_kernel", None): True,
    }
    assert launched == [call for call, needed in expected.items() if needed]


def test_input_is_kept_only_for_weight_gradients() -> None:
    def kept(names: tuple[str, ...]) -> int:
        arguments = wanting(Case(2, 5, 6, 7).arguments(torch.float32), names)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel() if t.shape == arguments[0].shape else 0) or t,
            lambda t: t,
        ):
            fused_smlp(*arguments)
        return sum(sizes)

    assert kept(("x",)) == 0
    assert kept(NAMES) == 2 * 5 * 6 * 7


def test_strided_weights() -> None:
    arguments = Case(2, 5, 6, 4).arguments(torch.float64)
    arguments[1] = arguments[1].t()
    arguments[2] = arguments[2][:1].expand(5)
    arguments[4] = torch.stack([arguments[4]] * 2, dim=-1)[:, 0]
    arguments[5] = torch.stack([arguments[5]] * 2, dim=-1)[..., 0]
    arguments = wanting([a.detach() for a in arguments])
    dy = Case(2, 5, 6, 4).arguments(torch.float64, seed=1)[0]
    exact = gradients(formula, to_float64(arguments), dy)
    for name, a, e in zip(NAMES, gradients(fused_smlp, arguments, dy), exact, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


@pytest.mark.parametrize("missing", ["bias_h", "bias_w"])
def test_one_bias_of_two(missing: str) -> None:
    arguments = Case(2, 5, 6, 4).arguments(torch.float64)
    arguments[NAMES.index(missing)] = None
    arguments = wanting(arguments)
    dy = Case(2, 5, 6, 4).arguments(torch.float64, seed=1)[0]
    exact = gradients(formula, to_float64(arguments), dy)
    names = [name for name in NAMES if name != missing]
    for name, a, e in zip(names, gradients(fused_smlp, arguments, dy), exact, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


def test_empty_batch_has_zero_weight_gradients() -> None:
    arguments = wanting(Case(0, 5, 4, 3).arguments(torch.float32))
    grads = torch.autograd.grad(fused_smlp(*arguments).sum(), arguments)
    for argument, grad in zip(arguments, grads, strict=True):
        assert grad.shape == argument.shape
        assert torch.equal(grad, torch.zeros_like(argument))


CHUNKED = Case(5, 6, 9, 5)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backward takes two images of ``CHUNKED`` at a time in float64."""
    image = CHUNKED.height * CHUNKED.width * axis.matrix_columns(CHUNKED.channels) * 8
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2 * image)
    backward.backward_plan.cache_clear()
    yield
    backward.backward_plan.cache_clear()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_batches_in_chunks(dtype: torch.dtype, layout: str) -> None:
    case = CHUNKED if dtype == torch.float64 else replace(CHUNKED, batch=17)  # three chunks
    arguments = wanting(case.arguments(dtype, layout))
    dy = case.arguments(dtype, layout, seed=1)[0]
    exact = gradients(formula, to_float64(arguments), dy.double())
    peer = gradients(smlp, arguments, dy)
    actual = gradients(fused_smlp, arguments, dy)
    for name, a, e, p in zip(NAMES, actual, exact, peer, strict=True):
        assert_close(a, e, p, eps=EPS[dtype], name=name, reduction=case.reduction(name))
    for a, again in zip(actual, gradients(fused_smlp, arguments, dy), strict=True):
        assert torch.equal(a, again)


@pytest.mark.usefixtures("chunks")
def test_axes_of_no_tile_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(axis, "axis_row", lambda *_: None)
    arguments = wanting(CHUNKED.arguments(torch.float64))
    dy = CHUNKED.arguments(torch.float64, seed=1)[0]
    exact = gradients(formula, to_float64(arguments), dy)
    for name, a, e in zip(NAMES, gradients(fused_smlp, arguments, dy), exact, strict=True):
        reduction = CHUNKED.reduction(name)
        assert_close(a, e, None, eps=EPS[torch.float64], name=name, reduction=reduction)


@pytest.mark.parametrize("size", [9, 140])
def test_bad_values_stay_in_their_image(size: int) -> None:
    arguments = wanting(Case(4, 5, size, 3).arguments(torch.float32), ("x", "weight_h"))
    dy = Case(4, 5, size, 3).arguments(torch.float32, seed=1)[0]
    dy[1, 0, -1, -1] = torch.nan
    dx, _ = gradients(fused_smlp, arguments, dy)
    exact, _ = gradients(formula, to_float64(arguments), dy.double())
    assert torch.equal(dx.isnan(), exact.isnan())
    assert bool(dx[1].isnan().any()) and not bool(dx[[0, 2, 3]].isnan().any())


def test_backward_inside_autocast_computes_in_the_type_of_x() -> None:
    case = Case(2, 5, 70, 7)  # of which one axis is left to PyTorch's products
    arguments = wanting(case.arguments(torch.float32))
    dy = case.arguments(torch.float32, seed=1)[0]
    expected = gradients(fused_smlp, arguments, dy)
    y = fused_smlp(*arguments)
    with torch.autocast(DEVICE, torch.float16):
        actual = torch.autograd.grad(y, arguments, dy)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_scratch_memory_is_bounded() -> None:
    """At every stage, in every layout: one chunk and what is copied for it."""
    for (height, width, channels), dense in itertools.product(
        STAGES, itertools.product([True, False], repeat=3)
    ):
        shape = torch.Size((128, channels, height, width))
        plan = backward.backward_plan(
            shape, dense, backward.Needed(True, True, True, True),
            torch.bfloat16, "ieee", 90,
        )  # fmt: skip
        copies = channels * sum(not is_rows for is_rows in dense)
        assert plan.matrix[0] * (plan.matrix[1] + copies) * 2 <= rows.CHUNK_BYTES == 34_500_000
        assert sum(chunk.pixels for chunk in plan.chunks) == 128 * height * width
        if all(dense) and height <= 14:
            assert len(plan.chunks) <= 2  # of four launches each, and one for the sums


def test_products_over_pixels_fill_a_gpu() -> None:
    """In equal parts of every chunk, each of the tiles of a product; wide ones are enough alone."""
    for height, width, channels in STAGES:
        shape = torch.Size((100, channels, height, width))  # the last chunk is smaller
        plan = backward.backward_plan(
            shape, (True, True, True), backward.Needed(True, True, True, True),
            torch.bfloat16, "ieee", 80,
        )  # fmt: skip
        parts, _, columns = plan.total
        assert all(chunk.pixels % parts == 0 for chunk in plan.chunks)
        tiles = -(-channels // 128) * -(-columns // 128)
        assert parts * tiles <= 160
        assert parts > 8 if channels <= 112 else parts == 1 if channels >= 768 else True


def test_offsets_inside_a_chunk_fit_31_bits() -> None:
    for size in (1, 56, MAX_SIZE):
        shape = torch.Size((5000, MAX_CHANNELS, size, MAX_SIZE))
        plan = backward.backward_plan(
            shape, (True, True, True), backward.Needed(True, True, True, True),
            torch.float16, "ieee", 90,
        )  # fmt: skip
        assert plan.matrix[0] * plan.matrix[1] <= 2**31 - 1
        assert sum(chunk.pixels for chunk in plan.chunks) == 5000 * size * MAX_SIZE


def test_64_bit_offsets_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = wanting(Case(2, 14, 9, 18).arguments(torch.float32, "bordered"))
    dy = Case(2, 14, 9, 18).arguments(torch.float32, "strided", seed=1)[0]
    expected = gradients(fused_smlp, arguments, dy)
    monkeypatch.setattr(rows, "INT32_MAX", 0)
    monkeypatch.setattr(rows, "copy_images_plan", rows.copy_images_plan.__wrapped__)
    for a, b in zip(gradients(fused_smlp, arguments, dy), expected, strict=True):
        assert torch.equal(a, b)


def test_weight_gradients_of_half_inputs_keep_the_weights_precision() -> None:
    """Mixed precision: float32 weights get gradients that were never rounded to float16."""
    case = Case(4, 7, 7, 16)
    x = case.arguments(torch.float16)[0]
    weights = [w.half().float().requires_grad_() for w in case.arguments(torch.float32)[1:]]
    dy = case.arguments(torch.float16, seed=1)[0]
    exact_weights = to_float64(weights)
    exact = torch.autograd.grad(formula(x.double(), *exact_weights), exact_weights, dy.double())
    actual = torch.autograd.grad(ops.mix(x, *weights), weights, dy)
    for name, a, e in zip(NAMES[1:], actual, exact, strict=True):
        assert a.dtype == torch.float32
        # x_h, x_w and F'dy are rounded to half once each; sums are not
        error = (a.double() - e).norm() / e.norm()
        assert error < EPS[torch.float16], f"{name}: {error:.1e}"
        rounded = (e.half().double() - e).norm() / e.norm()
        assert not torch.equal(a, a.half().float()), f"{name}: rounded, which costs {rounded:.1e}"


@pytest.mark.parametrize(
    ("function", "transposed"),
    [
        pytest.param(ops.differentiable_mix, False, id="eager"),
        pytest.param(
            ops.differentiable_mix, True, id="eager transposed", marks=pytest.mark.complete
        ),
        pytest.param(ops.mix, False, id="registered", marks=pytest.mark.complete),
        pytest.param(ops.mix, True, id="registered transposed"),
    ],
)
def test_gradcheck(function: Block, transposed: bool) -> None:
    """Derivatives of both operators by finite differences, without any formula of ours."""
    arguments = Case(2, 3, 4, 2).arguments(torch.float64, "contiguous")
    if transposed:  # as the gradient of the input calls it
        arguments[1:] = Weights(*arguments[1:]).transposed()
    arguments = wanting(arguments)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(function, arguments, fast_mode=True, check_batched_grad=True)


def test_third_derivatives_of_a_subset() -> None:
    arguments = wanting(Case(1, 3, 2, 2).arguments(torch.float64), ("x", "weight_fuse"))

    def curvature(x: Tensor, weight_fuse: Tensor) -> Tensor:
        y = fused_smlp(x, *arguments[1:5], weight_fuse, arguments[6])
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight_fuse, create_graph=True)
        return second

    assert torch.autograd.gradcheck(curvature, (arguments[0], arguments[5]), fast_mode=True)


def test_gradient_penalty() -> None:
    """Double backward as people use it, in float32, against the formula."""
    case = Case(2, 6, 5, 4)
    arguments = wanting(case.arguments(torch.float32))

    def penalty_gradients(block: Block, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        y = block(*inputs)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), inputs)

    exact = penalty_gradients(formula, to_float64(arguments))
    peer = penalty_gradients(smlp, arguments)
    actual = penalty_gradients(fused_smlp, arguments)
    for name, a, e, p in zip(NAMES, actual, exact, peer, strict=True):
        assert_close(a, e, p, eps=EPS[torch.float32], name=name, reduction=case.reduction(name))


def test_one_block_twice_in_a_graph_and_accumulation() -> None:
    arguments = wanting(Case(2, 4, 4, 3).arguments(torch.float64))
    exact_arguments = to_float64(arguments)

    def twice(block: Block, inputs: list[Tensor]) -> None:
        for _ in range(2):
            y = block(block(*inputs), *inputs[1:])
            y.square().sum().backward()

    twice(formula, exact_arguments)
    twice(fused_smlp, arguments)
    for name, a, e in zip(NAMES, arguments, exact_arguments, strict=True):
        assert_close(a.grad, e.grad, None, eps=EPS[torch.float64], name=name)


def test_checkpointing() -> None:
    arguments = wanting(Case(2, 4, 4, 3).arguments(torch.float64))
    exact_arguments = to_float64(arguments)
    formula(*exact_arguments).square().sum().backward()
    y = torch.utils.checkpoint.checkpoint(fused_smlp, *arguments, use_reentrant=False)
    y.square().sum().backward()
    for name, a, e in zip(NAMES, arguments, exact_arguments, strict=True):
        assert_close(a.grad, e.grad, None, eps=EPS[torch.float64], name=name)
