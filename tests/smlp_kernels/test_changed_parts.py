"""Blocks whose submodules do more than their weights say: pruned, adapted, hooked, replaced."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from smlp import SMLPBlock, SparseMLP
from smlp.folding import foldable
from smlp.testing import EPS, assert_close, formula
from smlp_kernels import FusedSMLPBlock, fuse_model
from tests.smlp_kernels.oracle import DEVICE, Case

CASE = Case(2, 5, 6, 4)


class Adapter(nn.Module):
    """As adapters of common libraries: the weight is the layer's, what is computed is more."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.extra = nn.Parameter(torch.eye(layer.in_features).to(layer.weight))

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.extra.T


def adapt(block: SMLPBlock) -> None:
    block.proj_w = Adapter(block.proj_w)


def adapted(block: SMLPBlock) -> tuple[Tensor | None, ...]:
    weight_h, bias_h, weight_w, *rest = block.weights()
    return (weight_h, bias_h, weight_w + block.proj_w.extra, *rest)


def prune_half(block: SMLPBlock) -> None:
    prune.l1_unstructured(block.proj_h, "weight", 0.5)
    block.proj_h.weight_orig.data.mul_(-2)  # an optimizer's step: the hook masks the weight again


def pruned(block: SMLPBlock) -> tuple[Tensor | None, ...]:
    return (block.proj_h.weight_orig * block.proj_h.weight_mask, *block.weights()[1:])


def hook(block: SMLPBlock) -> None:
    block.fuse.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked(block: SMLPBlock) -> tuple[Tensor | None, ...]:
    *others, fuse, bias = block.weights()
    return (*others, 2 * fuse, 2 * bias)


def patch(block: SMLPBlock) -> None:
    original = block.proj_h.forward
    block.proj_h.forward = lambda x: original(3 * x)


def patched(block: SMLPBlock) -> tuple[Tensor | None, ...]:
    return (3 * block.proj_h.weight, *block.weights()[1:])


def replace(block: SMLPBlock) -> None:
    block.proj_h = nn.Identity()


def replaced(block: SMLPBlock) -> tuple[Tensor | None, ...]:
    identity = torch.eye(CASE.height, device=DEVICE, dtype=torch.float64)
    proj_w, fuse = block.proj_w, block.fuse
    return (identity, None, proj_w.weight, proj_w.bias, fuse.weight, fuse.bias)


CHANGES = [(adapt, adapted), (prune_half, pruned), (hook, hooked), (patch, patched)]
CHANGES += [(replace, replaced)]


@pytest.mark.parametrize("kind", [SMLPBlock, FusedSMLPBlock])
@pytest.mark.parametrize(("change", "weights"), CHANGES, ids=lambda f: f.__name__)
def test_what_is_computed_is_what_the_parts_do(
    change: Callable[[SMLPBlock], None],
    weights: Callable[[SMLPBlock], tuple[Tensor | None, ...]],
    kind: type[SMLPBlock],
) -> None:
    torch.manual_seed(0)
    block = kind(CASE.height, CASE.width, CASE.channels, device=DEVICE, dtype=torch.float64)
    x = CASE.arguments(torch.float64)[0]
    block(x)  # nothing may be remembered of how it was
    change(block)
    y = block(x)
    exact = formula(x, *weights(block))
    assert_close(y, exact, None, eps=EPS[torch.float64])
    leaves = list(block.parameters())
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(exact, leaves, dy)
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, None, eps=EPS[torch.float64], reduction=60)


def test_parametrized_weights_stay_on_the_kernels() -> None:
    torch.manual_seed(0)
    block = FusedSMLPBlock(CASE.height, CASE.width, CASE.channels, device=DEVICE).double()
    parametrizations.weight_norm(block.proj_h)
    assert block.is_determined_by_weights()
    x = CASE.arguments(torch.float64)[0]
    y = block(x)
    exact = formula(x, *block.weights())
    assert_close(y, exact, None, eps=EPS[torch.float64])
    magnitude = block.proj_h.parametrizations.weight.original0
    (actual,) = torch.autograd.grad(y.square().sum(), magnitude)
    (expected,) = torch.autograd.grad(exact.square().sum(), magnitude)
    assert_close(actual, expected, None, eps=EPS[torch.float64], reduction=60)


class Counting(nn.Module):
    """As spectral normalisation, which takes a step of its iteration at every call."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


@pytest.mark.parametrize("kind", [SMLPBlock, FusedSMLPBlock])
def test_parametrized_weights_are_computed_once(kind: type[SMLPBlock]) -> None:
    block = kind(CASE.height, CASE.width, CASE.channels, device=DEVICE, dtype=torch.float64)
    counters = []
    for part in (block.proj_h, block.proj_w, block.fuse):
        counters.append(Counting())
        parametrize.register_parametrization(part, "weight", counters[-1])
    before = [counter.calls for counter in counters]
    block(CASE.arguments(torch.float64)[0])
    assert [counter.calls - n for counter, n in zip(counters, before, strict=True)] == [1, 1, 1]


class Padded(nn.Conv2d):
    """Its forward is the convolution's, what that calls is not."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.roll(1, -1), weight, bias)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.fuse, "stride", (2, 2)),
        lambda block: setattr(block.fuse, "padding", (1, 1)),
        lambda block: setattr(block, "fuse", nn.Conv2d(12, 4, 3, padding=1)),
        lambda block: setattr(block, "fuse", nn.Conv2d(12, 4, 1, groups=2)),
        lambda block: setattr(block.proj_w, "forward", lambda x: x),
        lambda block: setattr(block.fuse, "_conv_forward", lambda x, *_: x),
        lambda block: setattr(block.fuse, "__class__", Padded),
        lambda block: block.proj_w.register_forward_pre_hook(lambda *_: None),
        lambda block: block.proj_w.register_full_backward_hook(lambda *_: None),
        lambda block: block.proj_w.register_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_what_the_kernels_do_not_compute(change: Callable[[SMLPBlock], object]) -> None:
    block = SMLPBlock(5, 6, 4)
    block.proj_h = nn.Linear(5, 5, bias=False)  # as good as what was there
    assert block.is_determined_by_weights()
    change(block)
    assert not block.is_determined_by_weights()


def test_adapted_blocks_are_not_folded() -> None:
    torch.manual_seed(0)
    model = SparseMLP(image_size=8, patch_size=2, num_classes=3, d_model=6, depth=[2, 1]).eval()
    first, *_ = [module for module in model.modules() if isinstance(module, SMLPBlock)]
    before = len(foldable(model).parts)
    adapt(first)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert len(foldable(model).parts) == before - 2  # the block's step and the convolution's before
    fuse_model(model, fold=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
