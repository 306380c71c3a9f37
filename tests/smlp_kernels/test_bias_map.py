"""A bias of every place, [C, H, W], in the stead of one of every channel."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smlp.testing import EPS, NAMES, assert_close, formula, to_float64
from smlp_kernels import functional, fused_smlp
from tests.smlp_kernels.oracle import DEVICE, Case

CASE = Case(3, 7, 5, 20)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda bias: bias,
    "channels last": lambda bias: bias.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "expanded": lambda bias: bias[:, :1].expand(20, 7, 5),
}


def arguments_with_map(dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(20, 7, 5, dtype=torch.float64, generator=generator).to(dtype).to(DEVICE)
    return [*CASE.arguments(dtype)[:6], LAYOUTS[layout](bias)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(layout: str) -> None:
    arguments = [a.requires_grad_() for a in arguments_with_map(torch.float64, layout)]
    exact_arguments = to_float64(arguments)
    y, exact = fused_smlp(*arguments), formula(*exact_arguments)
    assert_close(y, exact, None, eps=EPS[torch.float64])
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, arguments, dy)
    exact_grads = torch.autograd.grad(exact, exact_arguments, dy)
    for name, a, e in zip(NAMES, grads, exact_grads, strict=True):
        assert_close(a, e, None, eps=EPS[torch.float64], name=name)


def test_gradcheck() -> None:
    arguments = [a.requires_grad_() for a in Case(1, 2, 3, 2).arguments(torch.float64)]
    arguments[6] = torch.randn(2, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(fused_smlp, arguments)
    assert torch.autograd.gradgradcheck(fused_smlp, arguments, fast_mode=True)


def test_half_with_a_float32_bias_keeps_its_type_in_the_gradient() -> None:
    arguments = arguments_with_map(torch.float16)
    bias = arguments[6].float().requires_grad_()
    y = functional.dispatch(arguments[0], (*arguments[1:6], bias))
    exact = formula(*to_float64([*arguments[:6], bias]))
    assert y.dtype == torch.float16
    assert_close(y, exact, None, eps=EPS[torch.float16])
    (grad,) = torch.autograd.grad(y.sum(), bias)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, torch.full_like(bias, 3.0))


def test_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")
    arguments = arguments_with_map(torch.float64)
    exact = formula(*to_float64(arguments))
    assert_close(fused_smlp(*arguments), exact, None, eps=EPS[torch.float64])


def test_wrong_shape_is_named() -> None:
    arguments = arguments_with_map(torch.float64)
    arguments[6] = arguments[6].transpose(1, 2)
    with pytest.raises(ValueError, match=r"bias_fuse: expected shape \[20\] or \[20, 7, 5\]"):
        fused_smlp(*arguments)
