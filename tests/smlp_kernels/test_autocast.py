"""Autocast: every type of input, weight and autocast against the plain block; loss scaling; range.

The plain block is the specification of types. bfloat16 runs through the kernels here only for its
types: Triton's interpreter computes other values with it (triton-lang/triton#11584).
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from smlp import SMLPBlock
from smlp.block import smlp
from smlp.testing import EPS, NAMES, assert_close, formula, to_float64
from smlp_kernels import FusedSMLPBlock, functional, fused_smlp
from tests.smlp_kernels.oracle import DEVICE, Case

CASE = Case(2, 3, 4, 2)
TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AUTOCAST = [None, torch.float16, torch.bfloat16]


def types_of(
    kind: type[SMLPBlock], x: torch.dtype, weights: torch.dtype, autocast: torch.dtype | None
) -> list[torch.dtype] | str:
    """Of the output, of the gradient of x and of every parameter; or that it is refused."""
    block = kind(CASE.height, CASE.width, CASE.channels, device=DEVICE, dtype=weights)
    inputs = CASE.arguments(x)[0].requires_grad_()
    try:
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            y = block(inputs)
    except (TypeError, RuntimeError):
        return "refused"
    y.float().sum().backward()
    return [y.dtype, inputs.grad.dtype, *(p.grad.dtype for p in block.parameters())]


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
def test_types_are_the_plain_blocks(
    autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "fallback_reason", lambda x: None)
    for x, weights in itertools.product(TYPES, TYPES):
        expected = types_of(SMLPBlock, x, weights, autocast)
        actual = types_of(FusedSMLPBlock, x, weights, autocast)
        assert actual == expected, f"x {x}, weights {weights}"


@pytest.mark.parametrize("weights", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("x", [torch.float16, torch.float32], ids=str)
def test_values(x: torch.dtype, weights: torch.dtype) -> None:
    check_values([CASE.arguments(x)[0], *CASE.arguments(weights)[1:]])


def test_values_with_weights_of_several_types_and_strides() -> None:
    arguments = CASE.arguments(torch.float32)
    arguments[1] = arguments[1].half().t()
    arguments[3] = arguments[3][:1].expand(4, 4)
    arguments[5] = torch.stack([arguments[5]] * 2, dim=-1)[..., 0]
    check_values(arguments)


def check_values(arguments: list[Tensor]) -> None:
    arguments = [a.detach().requires_grad_() for a in arguments]
    exact_arguments = to_float64(arguments)
    dy = CASE.arguments(torch.float16, seed=1)[0]
    exact = formula(*exact_arguments)
    exact_grads = torch.autograd.grad(exact, exact_arguments, dy.double())
    results = []
    for block in (fused_smlp, smlp):
        with torch.autocast(DEVICE, torch.float16):
            y = block(*arguments)
        results.append([y, *torch.autograd.grad(y, arguments, dy)])
    names = ("output", *NAMES)
    for name, a, p, e in zip(names, *results, [exact, *exact_grads], strict=True):
        reduction = 1 if name == "output" else CASE.reduction(name)
        assert_close(a, e, p, eps=EPS[torch.float16], name=name, reduction=reduction)


def test_switched_off_inside() -> None:
    arguments = CASE.arguments(torch.float32)
    with torch.autocast(DEVICE, torch.float16), torch.autocast(DEVICE, enabled=False):
        y = fused_smlp(*arguments)
    exact = formula(*to_float64(arguments))
    assert_close(y, exact, smlp(*arguments), eps=EPS[torch.float32])


@pytest.mark.parametrize("name", ["x", "weight_w", "bias_fuse"])
def test_float64_does_not_mix_under_autocast(name: str) -> None:
    arguments = dict(zip(NAMES, CASE.arguments(torch.float32), strict=True))
    arguments[name] = arguments[name].double()
    with (
        torch.autocast(DEVICE, torch.float16),
        pytest.raises(TypeError, match="float64 is exempt from autocast"),
    ):
        fused_smlp(*arguments.values())


def test_on_the_meta_device() -> None:
    """It has no autocast, and asking whether it is on is an error there."""
    block = FusedSMLPBlock(3, 4, 2, device="meta")
    assert block(torch.empty(5, 2, 3, 4, device="meta")).shape == (5, 2, 3, 4)
    y = fused_smlp(*(a.to("meta") for a in CASE.arguments(torch.float16)))
    assert y.is_meta and y.dtype == torch.float16


def scaled_steps(block: nn.Module, bad_step: int, steps: int = 3) -> list[list[Tensor]]:
    """Parameters after every step of float16 training; x is infinite in one of them."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    after = []
    for step in range(steps):
        x = CASE.arguments(torch.float32, seed=step)[0]
        if step == bad_step:
            x[0, 0, 0, 0] = torch.inf
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = block(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (1024.0 if step < bad_step else 512.0)
        after.append([p.detach().clone() for p in block.parameters()])
    return after


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's, in that step
def test_loss_scaling() -> None:
    """A step with infinite gradients is left out, the others are those of the plain block."""
    torch.manual_seed(0)
    plain = SMLPBlock(CASE.height, CASE.width, CASE.channels, device=DEVICE)
    fused = FusedSMLPBlock(CASE.height, CASE.width, CASE.channels, device=DEVICE)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    expected = scaled_steps(plain, bad_step=1)
    actual = scaled_steps(fused, bad_step=1)
    assert all(torch.equal(a, b) for a, b in zip(actual[0], actual[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(actual[1], actual[2], strict=True))
    for a, b in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_sums_beyond_float16_that_come_back_into_its_range() -> None:
    """Partial sums of 40 x 60000 on the way to results in range: accumulators are float32."""
    height, width, channels = 1, 80, 1
    x = torch.full((1, channels, height, width), 60000.0)
    x[..., width // 2 :] *= -1  # the other half is another block of the sum
    weights = [
        *(torch.eye(height), torch.zeros(height), torch.ones(width, width), torch.zeros(width)),
        *(torch.full((channels, 3 * channels, 1, 1), 1 / 2), torch.zeros(channels)),
    ]
    arguments = [a.half().to(DEVICE).requires_grad_() for a in (x, *weights)]
    dy = torch.full_like(arguments[0], 2.0**-7)  # a power of two: these sums are exact
    exact_arguments = to_float64(arguments)
    exact = formula(*exact_arguments)
    exact_grads = torch.autograd.grad(exact, exact_arguments, dy.double())
    y = fused_smlp(*arguments)
    grads = torch.autograd.grad(y, arguments, dy)
    assert exact.abs().max() == 60000
    for name, a, e in zip(("output", *NAMES), (y, *grads), (exact, *exact_grads), strict=True):
        assert e.abs().max() <= torch.finfo(torch.float16).max, name
        assert_close(a, e, None, eps=EPS[torch.float16], name=name)
