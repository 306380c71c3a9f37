"""The same bits every time, whatever else is in the batch."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from smlp.testing import EPS, NAMES, assert_close
from smlp_kernels import fused_smlp
from tests.smlp_kernels.oracle import DEVICE, Case

CASE = Case(3, 3, 9, 5)  # two images a tile, one of them alone; two tiles along W
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def matmul_of_any_column_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a product is NumPy's, whose BLAS rounds the last columns differently."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.einsum("ik,kj->ij", a.astype(dtype), b.astype(dtype), optimize=False)

    monkeypatch.setattr(np, "matmul", matmul)


def with_gradients(arguments: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output, then the gradient of every argument."""
    arguments = [a.detach().requires_grad_() for a in arguments]
    y = fused_smlp(*arguments)
    return [y.detach(), *torch.autograd.grad(y, arguments, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats(dtype: torch.dtype) -> None:
    arguments = CASE.arguments(dtype)
    dy = CASE.arguments(dtype, seed=1)[0]
    first = with_gradients(arguments, dy)
    for _ in range(2):
        again = with_gradients([a.clone() for a in arguments], dy.clone())
        for name, a, b in zip(("output", *NAMES), again, first, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    """Output and input gradient: the same bits at another place, the same to rounding alone.

    For another number of pixels cuBLAS may choose another kernel. Weight gradients are sums over
    the batch, whose rounding follows its order.
    """
    x, *weights = CASE.arguments(dtype)
    dy = CASE.arguments(dtype, seed=1)[0]

    def output_and_gradient(x: Tensor, dy: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = fused_smlp(x, *weights)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]

    y, dx = output_and_gradient(x, dy)
    order = torch.tensor([*range(1, CASE.batch), 0], device=DEVICE)
    shuffled_y, shuffled_dx = output_and_gradient(x[order], dy[order])
    assert torch.equal(shuffled_y, y[order]) and torch.equal(shuffled_dx, dx[order])
    last = slice(CASE.batch - 1, CASE.batch)
    alone_y, alone_dx = output_and_gradient(x[last], dy[last])
    for alone, among in ((alone_y, y[last]), (alone_dx, dx[last])):
        assert_close(alone, among.double(), None, eps=EPS[dtype])


def test_under_deterministic_algorithms() -> None:
    """No operator on the way is refused or warned about, and the bits are those without it."""
    arguments = CASE.arguments(torch.float32)
    dy = CASE.arguments(torch.float32, seed=1)[0]
    results = []
    for asked_for in (True, False):
        torch.use_deterministic_algorithms(asked_for)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PyTorch's; Triton 3.6 has others
            results.append(with_gradients(arguments, dy))
    for name, a, b in zip(("output", *NAMES), *results, strict=True):
        assert torch.equal(a, b), name
