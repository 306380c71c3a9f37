"""The device guard without a second GPU: which device it makes current, around what."""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from smlp_kernels import fused_smlp, launch, ops
from tests.smlp_kernels.oracle import Case


@pytest.mark.parametrize(("index", "switched_to"), [(0, []), (1, [torch.device("cuda:1")])])
def test_device_of_the_tensor_becomes_the_current_one(
    index: int, switched_to: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(of: torch.device):
        entered.append(of)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    with launch.on_device_of(x):  # type: ignore[arg-type]
        assert entered == switched_to


def test_every_launch_of_a_training_step_is_under_the_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward, both backward kernels and double backward, each on the device of its own tensor."""
    guarded: list[bool] = []
    original = launch.Call.launch
    depth = 0

    @contextlib.contextmanager
    def guard(x: Tensor):
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    class Watched:
        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]):
            guarded.append(depth == 1)
            return self.kernel[grid]

    def launch_watched(call: launch.Call) -> None:
        plan = dataclasses.replace(call.plan, kernel=Watched(call.plan.kernel))
        original(call._replace(plan=plan))

    monkeypatch.setattr(ops, "on_device_of", guard)
    monkeypatch.setattr(launch.Call, "launch", launch_watched)
    arguments = [a.requires_grad_() for a in Case(1, 2, 3, 2).arguments(torch.float32)]
    y = fused_smlp(*arguments)
    assert guarded == [True]
    (dx,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
    dx.square().sum().backward()
    assert len(guarded) > 4 and all(guarded)
