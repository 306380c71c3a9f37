"""torch.compile beyond one call: training, batch sizes, whole networks; opcheck's odd inputs."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from smlp import SparseMLP
from smlp.testing import EPS, assert_close, formula, to_float64
from smlp_kernels import fuse_model, fused_smlp, launch, ops
from tests.smlp_kernels.oracle import DEVICE, Case

CASE = Case(2, 3, 4, 2)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


ODD_INPUTS = {
    "expanded": lambda x: x[:1, :, :, :1].expand(2, 2, 3, 4),
    "overlapping": lambda x: torch.cat([x.flatten(), x.flatten()]).as_strided(
        (2, 2, 3, 4), (5, 7, 2, 1)
    ),
    "no images": lambda x: x[:0],
}


@pytest.mark.parametrize("kind", ODD_INPUTS)
def test_opcheck_of_odd_inputs(kind: str) -> None:
    x, *weights = CASE.arguments(torch.float64, "contiguous")
    x = ODD_INPUTS[kind](x).requires_grad_()
    weights = [w.requires_grad_() for w in weights]
    library.opcheck(ops.mix, (x, *weights))
    dy = torch.randn(2, 2, 3, 4, dtype=torch.float64, device=DEVICE)[: len(x)].requires_grad_()
    library.opcheck(ops.mix_backward, (dy, x, *weights[:5], True, True, True, True))


@pytest.mark.parametrize("x", [torch.float16, torch.float32], ids=str)
def test_opcheck_of_mixed_types(x: torch.dtype) -> None:
    """As under autocast, or with a float16 model's float32 input."""
    other = torch.float32 if x == torch.float16 else torch.float16
    inputs = CASE.arguments(x)[0]
    weights = CASE.arguments(other)[1:]
    dy = CASE.arguments(x, seed=1)[0]
    # aot_dispatch compares values with tolerances of the type of each
    library.opcheck(ops.mix, (inputs, *weights))
    library.opcheck(ops.mix_backward, (dy, inputs, *weights[:5], True, True, False, True))


def test_training_compiles_once_for_all_batch_sizes() -> None:
    """Without a hint that the batch varies: again at the second size, then never."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_smlp, fullgraph=True, backend=counter)
    weights = [w.requires_grad_() for w in CASE.arguments(torch.float64)[1:]]
    for batch in (5, 6, 7, 9, 11):  # no size of another axis, which would be taken for the same
        x = Case(batch, 3, 4, 2).arguments(torch.float64)[0].requires_grad_()
        exact_arguments = to_float64([x, *weights])
        exact = formula(*exact_arguments)
        exact_grads = torch.autograd.grad(exact.square().sum(), exact_arguments)
        y = compiled(x, *weights)
        assert y.stride() == x.stride()
        grads = torch.autograd.grad(y.square().sum(), [x, *weights])
        for a, e in zip((y, *grads), (exact, *exact_grads), strict=True):
            assert_close(a, e, None, eps=EPS[torch.float64])
    assert counter.frame_count == 2


def test_training_step_of_a_network() -> None:
    """One graph, the same loss and gradients as eager; channels_last in and between."""
    torch.manual_seed(0)
    model = SparseMLP((8, 8), 2, 3, 5, d_model=4, depth=[1, 1]).to(DEVICE)
    model = model.to(memory_format=torch.channels_last).eval()  # BatchNorm's statistics stay
    fuse_model(model)
    x = torch.randn(2, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def loss(image: Tensor) -> Tensor:
        return model(image).square().mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(x)
        results.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5 * eager.abs().max().item())


def test_compiled_under_autocast_keeps_the_types() -> None:
    arguments = [a.requires_grad_() for a in CASE.arguments(torch.float32)]
    compiled = torch.compile(fused_smlp, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.float16):
        y = compiled(*arguments)
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y.float().sum(), arguments)
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_compiled_transforms(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    """PyTorch's own operators, for those that a library registers do not pass them there."""
    x, *weights = [a.requires_grad_() for a in CASE.arguments(torch.float64)]

    def through(block: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return transform(lambda x: block(x.view(-1, 2, 3, 4), *weights).pow(3).sum())

    compiled = torch.compile(through(fused_smlp), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x.detach()), through(formula)(x.detach()), None, eps=EPS[torch.float64])


def test_disabling_is_seen_by_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is part of what the graph was made for."""
    counter = CompileCounterWithBackend("eager")
    arguments = CASE.arguments(torch.float64)
    targets = []
    for value in ("0", "1"):
        monkeypatch.setenv("SMLP_KERNELS_DISABLE", value)
        torch._dynamo.reset()
        torch.compile(fused_smlp, fullgraph=True, backend=counter)(*arguments)
        targets.append({node.target for node in counter.graphs[-1].graph.nodes})
    assert ops.mix in targets[0] and ops.mix not in targets[1]


def test_the_compute_capability_is_traced_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3))
    compiled = torch.compile(lambda y: y + launch.arch_of(x), fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(torch.zeros(())) == 93
