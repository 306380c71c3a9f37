"""Warming up: the kernels that a training step launches, compiled without one."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from smlp import SMLPBlock, SparseMLP
from smlp_kernels import FusedSMLPBlock, fuse_model, warmup
from smlp_kernels.launch import Call
from tests.smlp_kernels.oracle import DEVICE
from tools import aot


def model_of(dtype: torch.dtype = torch.float32, *, fuse_bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        FusedSMLPBlock(6, 5, 8, fuse_bias=fuse_bias),
        nn.Dropout(0.5),
        FusedSMLPBlock(6, 5, 8, fuse_bias=fuse_bias),
        nn.AdaptiveAvgPool2d(1),
    ).to(DEVICE, dtype)


def described(call: Call) -> str:
    """All that decides about the binary."""
    source, plan = aot.source(call), call.plan
    return repr((source.fn.__name__, plan.options, source.signature, plan.constants))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What was compiled and what was launched."""
    seen: dict[str, list[str]] = {"compile": [], "launch": []}
    original = Call.by_triton

    def noted(self: Call, *, launch: bool = True) -> Any:
        seen["launch" if launch else "compile"].append(described(self))
        return original(self, launch=launch)

    monkeypatch.setattr(Call, "by_triton", noted)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("fuse_bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("proj_w",), ("proj_h", "proj_w", "fuse")], ids=str)
def test_a_step_launches_what_was_compiled(
    frozen: tuple[str, ...],
    fuse_bias: bool,
    memory_format: torch.memory_format,
    training: bool,
    calls: dict[str, list[str]],
) -> None:
    model = model_of(fuse_bias=fuse_bias).to(memory_format=memory_format)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    report = warmup(model, (4, 3, 6, 5), memory_format=memory_format, training=training)
    assert not calls["launch"]
    x = torch.randn(4, 3, 6, 5, device=DEVICE).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(training):
        y = model(x)
    if training:
        y.square().sum().backward()
    assert set(calls["launch"]) == set(calls["compile"])
    assert len(set(calls["compile"])) == report.kernels


def test_under_autocast(calls: dict[str, list[str]]) -> None:
    model = model_of()
    with torch.autocast(DEVICE, torch.float16):
        warmup(model, (2, 3, 6, 5))
        y = model(torch.randn(2, 3, 6, 5, device=DEVICE))
    y.sum().backward()
    assert set(calls["launch"]) == set(calls["compile"])
    (forward,) = {c for c in calls["compile"] if "'ALONG_H': None" in c}
    assert "fp16" in forward and "fp32" in forward  # x, and the biases


def test_input_type_can_be_chosen(calls: dict[str, list[str]]) -> None:
    warmup(FusedSMLPBlock(6, 5, 8, dtype=torch.float64, device=DEVICE), (2, 8, 6, 5))
    assert "fp64" in calls["compile"][0]
    with pytest.raises(ValueError, match=r"input_shape: .* FusedSMLPBlock takes.*dtype"):
        warmup(FusedSMLPBlock(6, 5, 8, device=DEVICE), (2, 8, 6, 5), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training: bool) -> None:
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    warmup(model, (4, 3, 6, 5), training=training)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_changes_in_what_is_shared(calls: dict[str, list[str]]) -> None:
    """A block in two places, and a projection in two blocks."""
    model = model_of()
    model[4].proj_h = model[2].proj_h
    model.insert(5, model[2])
    before = [(name, p, p.detach().clone()) for name, p in model.named_parameters()]
    warmup(model, (2, 3, 6, 5))
    assert calls["compile"]
    for (name, parameter, value), (_, now) in zip(before, model.named_parameters(), strict=True):
        assert now is parameter and torch.equal(now, value), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_folded_network(calls: dict[str, list[str]]) -> None:
    model = SparseMLP(
        image_size=(16, 24), patch_size=2, in_channels=1, num_classes=3, d_model=6, depth=[1, 2]
    )
    fuse_model(model.to(DEVICE).eval(), fold=True)
    warmup(model, (2, 1, 16, 24), training=False)
    with torch.no_grad():
        model(torch.randn(2, 1, 16, 24, device=DEVICE))
    assert set(calls["launch"]) == set(calls["compile"])


class Scaled(nn.Module):
    """Calls its block by keyword, on what it scales by a tensor that is no part of it."""

    scale = torch.full((), 2.0, device=DEVICE)

    def __init__(self) -> None:
        super().__init__()
        self.block = FusedSMLPBlock(6, 5, 3, device=DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x=x * self.scale)


def test_any_way_to_call_a_block(calls: dict[str, list[str]]) -> None:
    model = Scaled()
    warmup(model, (2, 3, 6, 5))
    model(torch.randn(2, 3, 6, 5, device=DEVICE)).square().sum().backward()
    assert set(calls["launch"]) == set(calls["compile"])


@pytest.mark.parametrize(
    "shape", [(2, 3, 6), (2, 3, 6, 0), (2, 3, 6, 5.0), (2, 3, 6, 7), 6, None], ids=str
)
def test_bad_input_shape(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"^input_shape: expected"):
        warmup(model_of(), shape)


def test_model_without_fused_blocks() -> None:
    with pytest.raises(ValueError, match=r"^model: .* found none in Sequential"):
        warmup(nn.Sequential(nn.Linear(3, 3), SMLPBlock(3, 3, 3)), (1, 3, 3, 3))
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got int"):
        warmup(3, (1, 3, 3, 3))  # type: ignore[arg-type]


def test_why_no_block_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")
    with pytest.raises(ValueError, match=r"^model: .* SMLP_KERNELS_DISABLE=1 is set"):
        warmup(model_of(), (1, 3, 6, 5))
    monkeypatch.delenv("SMLP_KERNELS_DISABLE")
    block = FusedSMLPBlock(6, 5, 3, device=DEVICE)
    block.fuse.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^model: .* none is run by its weights alone"):
        warmup(block, (1, 3, 6, 5))


def run(script: str) -> str:
    """What a script prints in a process without the interpreter and without a GPU."""
    ours = ("TRITON_INTERPRET", "SMLP_KERNELS_HOPPER")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_cpu_has_nothing_to_compile() -> None:
    script = """
from smlp_kernels import FusedSMLPBlock, warmup
try:
    warmup(FusedSMLPBlock(6, 5, 8), (1, 8, 6, 5))
except ValueError as error:
    print(error)
"""
    message = run(script)
    assert message.startswith("model: ")
    assert message.endswith("the device is cpu; the kernels need an NVIDIA GPU")


SETUP = """
import contextlib
import sys
import torch
import triton
from smlp_kernels import FusedSMLPBlock, functional, launch, ops, warmup
from tests.rehearsal import driver

driver.use(90)
functional.fallback_reason = lambda x: None
ops.run_hopper = None  # which is no kernel of Triton's
launch.arch_of = lambda x: 90
launch.on_device_of = lambda x: contextlib.nullcontext()
block = FusedSMLPBlock(14, 14, 64, dtype=torch.bfloat16)

def warm(batch):
    return warmup(block, (batch, 64, 14, 14), memory_format=torch.channels_last)

KERNELS = {value for name, module in list(sys.modules.items())
           if name.startswith("smlp_kernels.kernels.") for value in vars(module).values()
           if isinstance(value, triton.JITFunction)}

def binaries():
    caches = [kernel.device_caches[0][0] for kernel in KERNELS if kernel.device_caches]
    return [binary for cache in caches for binary in cache.values()]
"""


def test_binaries_are_compiled_and_loaded_for_every_batch_size() -> None:
    script = """
report = warm(7)
found = binaries()
print(report.kernels, len(found), all(b.asm["cubin"] for b in found))
print(len(driver.Launcher.built), len(driver.Driver.loaded))
warm(128)
print(len(binaries()), len(driver.Launcher.built))
"""
    assert run(SETUP + script).split() == ["5", "5", "True", "5", "5", "5", "5"]


def test_a_kernel_that_two_threads_failed_to_parse_is_compiled_again() -> None:
    script = """
import tempfile
import threading

triton.knobs.cache.dir = tempfile.mkdtemp()  # where nothing was compiled yet
parse, failed = triton.JITFunction.parse, []

def disturbed(self):
    if threading.current_thread() is not threading.main_thread() and not failed:
        failed.append(self)
        raise SystemError("AST constructor recursion depth mismatch (before=96, after=95)")
    return parse(self)

triton.JITFunction.parse = disturbed
print(warm(7).kernels, len(failed), all(b.asm["cubin"] for b in binaries()))
"""
    assert run(SETUP + script).split() == ["5", "1", "True"]


def test_a_compilation_that_failed_spoils_no_other() -> None:
    script = """
def broken(*arguments, **options):
    raise ValueError("no such instruction")

intact, triton.compiler.compile = triton.compiler.compile, broken
try:
    warm(7)
except ValueError as error:
    print(error)
triton.compiler.compile = intact
other = FusedSMLPBlock(7, 7, 64, dtype=torch.float16)
for kernel in KERNELS:
    kernel.compile = intact  # each keeps what it found when it was first used
print(warmup(other, (1, 64, 7, 7)).kernels, len(driver.Driver.loaded))
"""
    assert run(SETUP + script).splitlines() == ["no such instruction", "6 6"]
