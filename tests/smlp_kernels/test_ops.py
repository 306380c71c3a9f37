"""The registered operators: schema, fake, autograd, torch.compile, functorch."""

import itertools

import pytest
import torch
from torch import Tensor, library, nn
from torch.utils.flop_counter import FlopCounterMode

from smlp import SMLPBlock, SparseMLP
from smlp.testing import EPS, NAMES, assert_close, formula
from smlp_kernels import FusedSMLPBlock, fuse_model, fused_smlp, ops
from smlp_kernels.weights import Weights
from tests.smlp_kernels.oracle import DEVICE, Case


def inputs(requires_grad: bool = True, layout: str = "channels_last") -> list[Tensor]:
    values = Case(2, 3, 4, 2).arguments(torch.float64, layout)
    return [v.requires_grad_(requires_grad) for v in values]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_mix(transposed: bool, layout: str) -> None:
    values: list[Tensor | None] = list(inputs(layout=layout))
    if transposed:
        values[1:] = Weights(*(v.detach() for v in values[1:])).transposed()
    library.opcheck(ops.mix, values)


@pytest.mark.parametrize(
    "needed",
    [
        pytest.param(needed, marks=() if sum(needed) in (1, 4) else pytest.mark.complete)
        for needed in itertools.product([False, True], repeat=4)
    ],
    ids=str,
)
def test_opcheck_mix_backward(needed: tuple[bool, bool, bool, bool]) -> None:
    values = inputs()
    dy = torch.randn_like(values[0]).requires_grad_()
    library.opcheck(ops.mix_backward, (dy, *values[:6], *needed))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_compiled_forward_and_backward(backend: str, layout: str) -> None:
    torch._dynamo.reset()
    values = inputs(layout=layout)
    compiled = torch.compile(fused_smlp, fullgraph=True, backend=backend)
    y = compiled(*values)
    exact_values = inputs(layout=layout)
    exact = formula(*exact_values)
    assert y.stride() == values[0].stride()
    assert_close(y, exact, None, eps=EPS[torch.float64])
    grads = torch.autograd.grad(y.square().sum(), values)
    exact_grads = torch.autograd.grad(exact.square().sum(), exact_values)
    for name, grad, expected in zip(NAMES, grads, exact_grads, strict=True):
        assert_close(grad, expected, None, eps=EPS[torch.float64], name=name)


def test_compiled_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    values = inputs(requires_grad=False)
    compiled = torch.compile(fused_smlp, fullgraph=True, dynamic=True, backend=counting)
    for batch in (5, 6, 7, 9):  # no size of another axis, which would be taken for the same
        x = torch.randn(batch, 2, 3, 4, dtype=torch.float64, device=DEVICE)
        expected = formula(x, *values[1:])
        assert_close(compiled(x, *values[1:]), expected, None, eps=EPS[torch.float64])
    assert graphs == 1


def test_compiled_network_has_one_graph_with_the_operator_in_it() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = SparseMLP((8, 8), 2, 3, 5, d_model=4, depth=[1, 1]).to(DEVICE, torch.float64)
    blocks = fuse_model(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=DEVICE)
    explanation = torch._dynamo.explain(model)(x)
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0
    calls = [node.target for node in explanation.graphs[0].graph.nodes]
    assert calls.count(ops.mix) == blocks


def test_export_keeps_the_operator() -> None:
    model = nn.Sequential(SMLPBlock(3, 4, 2, dtype=torch.float64, device=DEVICE))
    fuse_model(model)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=DEVICE)
    exported = torch.export.export(model, (x,))
    assert ops.mix in [node.target for node in exported.graph.nodes]
    expected = formula(x, *model[0].weights())
    assert_close(exported.module()(x), expected, None, eps=EPS[torch.float64])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_graph_holds_the_operator() -> None:
    block = FusedSMLPBlock(3, 4, 2, dtype=torch.float64, device=DEVICE)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=DEVICE)
    traced = torch.jit.trace(block, x)
    assert "smlp_kernels::mix" in str(traced.graph)
    assert_close(traced(x), formula(x, *block.weights()), None, eps=EPS[torch.float64])
    (actual,) = torch.autograd.grad(traced(x).pow(2).sum(), block.proj_h.weight)
    (exact,) = torch.autograd.grad(formula(x, *block.weights()).pow(2).sum(), block.proj_h.weight)
    assert_close(actual, exact, None, eps=EPS[torch.float64], reduction=16)


def test_functional_call() -> None:
    values = inputs(requires_grad=False)
    block = SMLPBlock(3, 4, 2, dtype=torch.float64, device=DEVICE)
    fuse_model(block)
    names = ["proj_h.weight", "proj_h.bias", "proj_w.weight", "proj_w.bias"]
    weights = dict(zip([*names, "fuse.weight", "fuse.bias"], values[1:], strict=True))
    y = torch.func.functional_call(block, weights, (values[0],))
    assert_close(y, formula(*values), None, eps=EPS[torch.float64])


def test_func_grad_and_vmap_over_inputs() -> None:
    values = inputs(requires_grad=False)
    xs = torch.randn(3, *values[0].shape, dtype=torch.float64, device=DEVICE)

    def loss(x: Tensor, block) -> Tensor:
        return block(x, *values[1:]).square().sum()

    expected = torch.stack([formula(x, *values[1:]) for x in xs])
    actual = torch.func.vmap(lambda x: fused_smlp(x, *values[1:]))(xs)
    assert_close(actual, expected, None, eps=EPS[torch.float64])
    expected = torch.func.grad(loss)(xs[0], formula)
    assert_close(torch.func.grad(loss)(xs[0], fused_smlp), expected, None, eps=EPS[torch.float64])


def test_per_sample_weight_gradients() -> None:
    values = inputs(requires_grad=False)

    def loss(weight: Tensor, x: Tensor, block) -> Tensor:
        return block(x[None], weight, *values[2:]).square().sum()

    def per_sample(block) -> Tensor:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))(
            values[1], values[0], block
        )

    assert_close(per_sample(fused_smlp), per_sample(formula), None, eps=EPS[torch.float64])


@pytest.mark.parametrize("input_learns", [True, False])
@pytest.mark.parametrize(
    "frozen",
    [[], ["proj_h"], ["proj_h", "proj_w"], ["fuse"], ["proj_h", "fuse"], ["proj_w", "fuse"],
     ["proj_h", "proj_w", "fuse"]],
    ids=" ".join,
)  # fmt: skip
def test_counted_operations_are_the_plain_blocks(frozen: list[str], input_learns: bool) -> None:
    if len(frozen) == 3 and not input_learns:
        return  # nothing to count
    plain = SMLPBlock(3, 4, 2, device=DEVICE)
    fused = FusedSMLPBlock(3, 4, 2, device=DEVICE)
    counts = []
    for block in (plain, fused):
        for name in frozen:
            block.get_submodule(name).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            x = torch.randn(5, 2, 3, 4, device=DEVICE, requires_grad=input_learns)
            block(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] > 0
