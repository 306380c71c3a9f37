"""Out of memory anywhere inside a call leaves arguments, gradients and the next call healthy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smlp_kernels import fused_smlp, launch, ops
from tests.smlp_kernels.oracle import DEVICE, Case

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="gradients come on a thread of their own there; see test_gpu.py"
)
CASE = Case(2, 3, 4, 2)
# A mode is not consulted inside an operator that it was asked about: these are opened up.
INSIDE: dict[Any, Callable] = {ops.mix: ops.run_mix, ops.mix_backward: ops.run_mix_backward}
MAKES_A_TENSOR = ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "clone", "sum",
                  "_to_copy", "add", "mul", "ones_like")  # fmt: skip


class FullMemory(TorchDispatchMode):
    """Fail at the operator number ``at`` that makes a tensor, counted from 0."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        if function in INSIDE:
            with self:
                return INSIDE[function](*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in MAKES_A_TENSOR:
            self.made += 1
            if self.made > self.at:
                raise torch.OutOfMemoryError("no memory left")
        return function(*args, **(kwargs or {}))


def step(arguments: list[Tensor], memory: FullMemory | None = None) -> list[Tensor]:
    """Output and gradients, with ``memory`` in force if given."""

    def run() -> list[Tensor]:
        y = fused_smlp(*arguments)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), arguments)]

    if memory is None:
        return run()
    with memory:
        return run()


def test_no_memory_anywhere_in_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [a.requires_grad_() for a in CASE.arguments(torch.float32)]
    before = [(a._version, a.detach().clone()) for a in arguments]
    expected = step(arguments)
    for at in range(1000):
        with monkeypatch.context() as patch:
            # the kernels take no memory, but the interpreter of them does
            patch.setattr(launch.Call, "launch", lambda *_: None)
            try:
                step(arguments, FullMemory(at))
            except torch.OutOfMemoryError:
                pass
            else:
                break
        for argument, (version, values) in zip(arguments, before, strict=True):
            assert argument.grad is None
            assert argument._version == version and torch.equal(argument, values)
        for actual, healthy in zip(step(arguments), expected, strict=True):
            assert torch.equal(actual, healthy), f"after failure {at}"
    # output, three partial sums and their totals, gradients, the loss: many places to fail at
    assert 10 < at < 999, at


def test_a_failed_backward_adds_nothing_to_grad() -> None:
    arguments = [a.requires_grad_() for a in CASE.arguments(torch.float32)]
    fused_smlp(*arguments).square().sum().backward()
    before = [a.grad.clone() for a in arguments]
    y = fused_smlp(*arguments)
    with pytest.raises(torch.OutOfMemoryError), FullMemory(2):
        y.square().sum().backward()
    for argument, grad in zip(arguments, before, strict=True):
        assert torch.equal(argument.grad, grad)


class Broken:
    """A kernel whose launch fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch_kernel(*_: object, **__: object) -> None:
            raise RuntimeError(f"Triton Error [CUDA]: {self.name}")

        return launch_kernel


def test_a_failed_launch_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """No part of the way catches what a kernel raises, and nothing is remembered of it."""
    arguments = [a.requires_grad_() for a in CASE.arguments(torch.float32)]
    expected = step(arguments)
    launch_kernel = launch.Call.launch
    for kernel, along_h in (
        *(("axes_kernel", None), ("axes_kernel", True), ("axes_kernel", False)),
        ("weight_sums_kernel", None),
    ):

        def fail(call: launch.Call, kernel: str = kernel, along_h: bool | None = along_h) -> None:
            plan = call.plan
            if (plan.kernel.__name__, plan.constants.get("ALONG_H")) == (kernel, along_h):
                call = call._replace(plan=dataclasses.replace(plan, kernel=Broken(kernel)))
            launch_kernel(call)

        with monkeypatch.context() as patch:
            patch.setattr(launch.Call, "launch", fail)
            with pytest.raises(RuntimeError, match=kernel):
                step(arguments)
        for actual, healthy in zip(step(arguments), expected, strict=True):
            assert torch.equal(actual, healthy)
