"""A block checks its arguments once, and notices whatever is different in a later call."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from smlp.testing import EPS, assert_close, formula
from smlp_kernels import FusedSMLPBlock, modules, ops
from tests.smlp_kernels.oracle import DEVICE, Case

CASE = Case(2, 5, 5, 5)  # sizes that are easily taken for each other


@pytest.fixture
def block() -> FusedSMLPBlock:
    torch.manual_seed(0)
    return FusedSMLPBlock(5, 5, 5, device=DEVICE, dtype=torch.float64)


@pytest.fixture
def x(block: FusedSMLPBlock) -> Tensor:
    """An input that the block has seen, with and without gradients."""
    x = CASE.arguments(torch.float64)[0]
    with torch.no_grad():
        block(x)
    block(x.clone().requires_grad_())
    block(x)
    return x


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What is checked."""
    checked: list[Tensor] = []
    original = modules.check_input

    def check(x: Tensor, *arguments: Any) -> None:
        checked.append(x)
        original(x, *arguments)

    monkeypatch.setattr(modules, "check_input", check)
    yield checked


def same(block: FusedSMLPBlock, x: Tensor) -> None:
    weights = [w if w is None else w.detach().resolve_neg() for w in block.weights()]
    assert_close(block(x), formula(x, *weights), None, eps=EPS[torch.float64])


@pytest.mark.skipif(modules.TensorGuards is None, reason="this PyTorch has none")
def test_what_is_known_is_not_checked(
    block: FusedSMLPBlock, x: Tensor, checks: list[Tensor]
) -> None:
    same(block, x)
    same(block, x[:1])  # another batch
    same(block, x.contiguous(memory_format=torch.channels_last))
    same(copy.deepcopy(block), x)  # another block of the size
    assert checks == []
    same(block.float().double(), x.clone())
    assert checks == []


def test_right_without_the_help_of_pytorch(
    block: FusedSMLPBlock, checks: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "TensorGuards", None)
    monkeypatch.setattr(modules, "alike", {})
    x = CASE.arguments(torch.float64)[0]
    same(block, x)
    same(block, x)
    assert len(checks) == 2


def set_data(change: Callable[[Tensor], Tensor]) -> Callable[[FusedSMLPBlock], None]:
    """Other memory, strides or values in the same parameter."""

    def set_it(block: FusedSMLPBlock) -> None:
        block.proj_h.weight.data = change(block.proj_h.weight.data)

    return set_it


def replace(change: Callable[[Tensor], Tensor]) -> Callable[[FusedSMLPBlock], None]:
    """Another parameter."""

    def replace_it(block: FusedSMLPBlock) -> None:
        block.proj_w.weight = nn.Parameter(change(block.proj_w.weight.detach()))

    return replace_it


@pytest.mark.parametrize(
    "change",
    [
        set_data(lambda w: w.t()),
        set_data(lambda w: w.clone().neg_()),
        replace(lambda w: 2 * w),
        replace(torch._neg_view),
        lambda block: setattr(block.fuse, "bias", None),
        lambda block: setattr(block.proj_h, "bias", None),
        lambda block: setattr(block, "proj_w", nn.Linear(5, 5, bias=False).to(block.fuse.weight)),
    ],
)
def test_changed_weights_are_seen(
    change: Callable[[FusedSMLPBlock], None], block: FusedSMLPBlock, x: Tensor
) -> None:
    change(block)
    same(block, x)
    same(block, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace(lambda w: w[:4, :4]),
            r"proj_w.weight: expected shape \[5, 5\] for x .*, got \[4, 4\]",
        ),
        (
            replace(lambda w: w[:1]),
            r"proj_w.weight: expected shape \[5, 5\] for x .*, got \[1, 5\]",
        ),
        (replace(lambda w: w.float()), r"proj_w.weight: expected the type of x"),
        (replace(lambda w: w.to("meta")), r"proj_w.weight: expected the device of x"),
        (set_data(lambda w: w.float()), r"proj_h.weight: expected the type of x"),
        (
            lambda block: setattr(block.proj_h, "weight", None),
            r"proj_h.weight: expected a tensor, got NoneType",
        ),
        (
            lambda block: setattr(block.fuse, "bias", nn.Parameter(torch.zeros(5, 5, 5))),
            r"fuse.bias: expected shape \[5\] for x .*, got \[5, 5, 5\]",
        ),
        (
            lambda block: setattr(block.proj_h, "bias", nn.Parameter(torch.zeros(1))),
            r"proj_h.bias: expected shape \[5\] for x .*, got \[1\]",
        ),
    ],
)
def test_wrong_weights_are_refused(
    change: Callable[[FusedSMLPBlock], None], message: str, block: FusedSMLPBlock, x: Tensor
) -> None:
    change(block)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=message):
            block(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float(), "x: expected the parameters' dtype"),
        (lambda x: x[:, :4], "x: expected shape"),
        (lambda x: x[0], "x: expected shape"),
        (lambda x: x.to("meta"), "x: expected the parameters' device"),
        (lambda x: x.to_sparse(), "x: expected a dense tensor"),
        (lambda x: x.numpy(force=True), "x: expected a tensor"),
    ],
)
def test_wrong_inputs_are_refused(
    change: Callable[[Tensor], Any], message: str, block: FusedSMLPBlock, x: Tensor
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        block(change(x))


def test_inputs_that_only_look_known(block: FusedSMLPBlock, x: Tensor) -> None:
    negative, wrapped = torch._neg_view(x), []
    weights = [w.detach() for w in block.weights()]
    exact = formula(-x, *weights)
    assert_close(block(negative), exact, None, eps=EPS[torch.float64])

    torch.func.grad(lambda x: wrapped.append(x) or x.sum())(x)  # what is left of a transform
    assert_close(block(wrapped[0]), formula(x, *weights), None, eps=EPS[torch.float64])

    class Named(Tensor):
        pass

    assert isinstance(block(x.as_subclass(Named)), Named)


class Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        self.seen.append(function)
        return function(*arguments, **(options or {}))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_whatever_acts_on_operators_still_does(block: FusedSMLPBlock, x: Tensor) -> None:
    exact = formula(x, *[w.detach() for w in block.weights()])
    with Noting() as mode, torch.no_grad():
        block(x)
    assert ops.mix in mode.seen
    graph = make_fx(block)(x)  # by a mode of PyTorch's own, which the guards do not see
    assert ops.mix in [node.target for node in graph.graph.nodes]
    assert_close(graph(2 * x), block(2 * x), None, eps=EPS[torch.float64])
    with torch.autocast(DEVICE, torch.float16):
        with pytest.raises(TypeError, match="float64 is exempt"):
            copy.deepcopy(block).float()(x)
        assert block(x).dtype == torch.float64
    per_image = torch.func.vmap(lambda image: block(image[None])[0])(x)
    assert_close(per_image, exact, None, eps=EPS[torch.float64])
    _, tangent = torch.func.jvp(block, (x,), (x,))
    no_biases = [w if i % 2 == 0 else None for i, w in enumerate(block.weights())]
    assert_close(tangent, formula(x, *no_biases), None, eps=EPS[torch.float64])
    traced = torch.jit.trace(block, x, check_trace=False)
    assert "smlp_kernels::mix" in str(traced.graph)
    with torch.inference_mode():
        assert_close(block(x), exact, None, eps=EPS[torch.float64])


def test_kinds_are_kept_within_bounds(block: FusedSMLPBlock, x: Tensor) -> None:
    for index in range(2 * modules.KNOWN):
        for bit, weight in enumerate(block.parameters()):
            weight.requires_grad_(bool(index >> bit & 1))
        same(block, x)
    assert all(len(kinds) <= modules.KNOWN for kinds in modules.alike.values())
