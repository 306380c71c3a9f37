"""Kernels are handed to the driver as Triton hands them, and by Triton where it has to be told.

In a process without the interpreter, with a driver that compiles and notes what it is to launch.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import contextlib
import json
import torch
import triton
from smlp_kernels import FusedSMLPBlock, functional, launch, ops
from tests.rehearsal import driver

driver.use(90)
for module in (launch, functional, ops):
    module.arch_of = lambda x: 90
functional.fallback_reason = lambda x: None
ops.on_device_of = lambda x: contextlib.nullcontext()

noted, by_triton = [], []

def note(launcher, *arguments):
    noted.append([described(a) for a in arguments])

def described(value):
    if isinstance(value, torch.Tensor):
        return [list(value.shape), list(value.stride()), str(value.dtype)]
    if isinstance(value, triton.knobs.HookChain):
        return "hooks" if value.calls else None
    if type(value).__name__ == "LazyDict":  # for hooks alone
        return None
    return value if isinstance(value, int | str | bool | None) else repr(value)

driver.Launcher.__call__ = note
run = triton.JITFunction.run

def counted(kernel, *arguments, **options):
    by_triton.append(kernel.__name__)
    return run(kernel, *arguments, **options)

triton.JITFunction.run = counted
block = FusedSMLPBlock(14, 14, 32, dtype=torch.bfloat16)

def step(batch=2, shift=0):
    memory = torch.zeros(batch * 14 * 14 * 32 + shift, dtype=torch.bfloat16)
    x = memory[shift:].view(batch, 14, 14, 32).permute(0, 3, 1, 2).requires_grad_()
    dy = torch.ones_like(x)
    torch.autograd.grad(block(x), [x, *block.parameters()], dy)
    result = [list(by_triton), list(noted)]
    by_triton.clear(), noted.clear()
    return result

steps = {name: step() for name in ("first", "second")}
steps["shifted"], steps["shifted again"] = step(shift=4), step(shift=4)
hook = lambda metadata: None
triton.knobs.runtime.launch_enter_hook.add(hook)
steps["hooked"] = step()
triton.knobs.runtime.launch_enter_hook.remove(hook)
plain, block = block, block.float()  # under autocast the biases stay float32
with torch.autocast("cpu", torch.bfloat16):
    steps["other biases"] = step()
block = plain.bfloat16()
launch.DIRECT = False
steps["unknown Triton"] = step()
print(json.dumps(steps))
"""
KERNELS = ["axes_kernel", "axes_kernel", "axes_kernel", "weight_sums_kernel"]


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """By name, of a training step: which kernels Triton launched; arguments of all launches."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "SMLP_KERNELS_HOPPER": "0"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_first_launch_is_tritons_and_later_ones_are_not(steps: dict[str, Any]) -> None:
    assert steps["first"][0] == KERNELS
    assert steps["second"][0] == []


def test_both_hand_the_driver_the_same(steps: dict[str, Any]) -> None:
    assert len(steps["first"][1]) == len(KERNELS)
    assert steps["second"][1] == steps["first"][1]


def test_another_alignment_is_another_kernel(steps: dict[str, Any]) -> None:
    """8 bytes beyond a multiple of 16; what does not read x stays as it was."""
    assert steps["shifted"][0] == KERNELS[:3]
    assert steps["shifted again"][0] == []
    assert steps["shifted again"][1] == steps["shifted"][1]


def test_other_types_are_other_kernels(steps: dict[str, Any]) -> None:
    assert steps["other biases"][0] == KERNELS  # weights, gradients or biases are float32 in each


@pytest.mark.parametrize("name", ["hooked", "unknown Triton"])
def test_where_triton_has_to_be_told_it_launches(name: str, steps: dict[str, Any]) -> None:
    assert steps[name][0] == KERNELS
