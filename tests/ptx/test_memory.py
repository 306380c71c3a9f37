"""Which memory counts as written while kernels run."""

import pytest
import torch
from torch import Tensor

from tests.ptx.memory import WatchedMemory


def state(memory: WatchedMemory, tensor: Tensor) -> str:
    if memory.written(tensor) is None:
        return "input"
    return f"{memory.unwritten(tensor)} of {tensor.numel()}"


def test_tensors_from_outside_are_inputs() -> None:
    memory, x = WatchedMemory(), torch.zeros(4, 6)
    with memory:
        view = x[1:, ::2].t()
        y = x + 1
        x.add_(1)
    assert state(memory, x) == state(memory, view) == "input"
    assert state(memory, y) == "0 of 24"


def test_new_memory_is_nan_and_not_written() -> None:
    memory, x = WatchedMemory(), torch.zeros(4, 6, dtype=torch.bfloat16)
    with memory:
        made = [
            torch.empty(3, 5), torch.empty_like(x), x.new_empty(7), torch.empty(2, 3).double(),
            torch.empty_strided((2, 2), (8, 1)),
        ]  # fmt: skip
    states = [state(memory, tensor) for tensor in made]
    assert states == ["15 of 15", "24 of 24", "7 of 7", "0 of 6", "4 of 4"]
    assert all(bool(tensor.isnan().all()) for tensor in made)


def test_writes_of_pytorch_are_seen_where_they_are() -> None:
    memory = WatchedMemory()
    with memory:
        a, b = torch.empty(4, 6), torch.empty(4, 9)
        a[1:3, ::2] = 1
        torch.mm(torch.ones(4, 2), torch.ones(2, 5), out=b[:, 2:7])
        c, d = torch.empty(3), torch.empty(4)
        torch._foreach_copy_([c, d], [torch.zeros(3), torch.zeros(4)])
    assert state(memory, a) == "18 of 24" and state(memory, b) == "16 of 36"
    assert state(memory, b[:, 2:7]) == "0 of 20"
    assert state(memory, c) == "0 of 3" and state(memory, d) == "0 of 4"


def test_a_view_shares_its_map() -> None:
    memory = WatchedMemory()
    with memory:
        y = torch.empty(4, 6)
        view = y.view(2, 12)[1]
    written = memory.written(view)
    assert written is not None
    written[: view.numel() * 4] = 1  # as a kernel does
    assert state(memory, y) == "12 of 24" and state(memory, view) == "0 of 12"


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_products_of_pytorch_are_as_precise_as_on_a_gpu(precision: str) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(8, 64), torch.randn(64, 8), torch.randn(8, 8)
    out = torch.zeros(8, 8)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        with WatchedMemory():
            results = [torch.mm(a, b), torch.addmm(c, a, b) - c, torch.bmm(a[None], b[None])[0]]
            torch.mm(a, b, out=out)
    finally:
        matmul.fp32_precision = before
    for result in (*results, out):
        error = ((result.double() - a.double() @ b.double()).norm() / result.norm()).item()
        assert 1e-4 < error < 2e-3 if precision == "tf32" else error < 1e-6
