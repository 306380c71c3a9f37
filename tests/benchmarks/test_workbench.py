"""What the workbench builds on a machine without a GPU, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.providers import PROVIDERS, Provider
from benchmarks.shapes import LAYOUTS, Shape
from benchmarks.workbench import Workbench, WrongResultError, open_workbench
from smlp import SMLPBlock

SHAPE = Shape("odd", 2, 6, 5, 7)
HERE = [provider for provider in PROVIDERS.values() if not provider.gpu_only]
GRADIENTS = ("x", "weight_h", "bias_h", "weight_w", "bias_w", "weight_fuse", "bias_fuse")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", HERE, ids=lambda provider: provider.name)
@pytest.mark.parametrize("pass_", ["inference", "fwd+bwd"])
def test_providers_are_right(provider: Provider, layout: str, pass_: str) -> None:
    with open_workbench(SHAPE, "fp32", layout, pass_, [provider]) as bench:
        (step,) = bench.steps(provider.name)
        assert step() is not None
        gradients = {f"gradient of {name}" for name in GRADIENTS if pass_ != "inference"}
        assert set(bench.errors[provider.name]) == {"output"} | gradients
        assert all(0 < error < 1e-6 for error in bench.errors[provider.name].values())
        assert bench.gpu_us == {}


def test_every_pass_returns_what_it_should() -> None:
    eager, results = PROVIDERS["eager_nchw"], {}
    for pass_ in ("inference", "fwd", "bwd", "fwd+bwd"):
        with open_workbench(SHAPE, "fp32", "nchw", pass_, [eager]) as bench:
            results[pass_] = bench.steps(eager.name)[0]()
            results[pass_] = bench.steps(eager.name)[0]()  # and again
            parameters = list(bench.block.parameters())
    assert not results["inference"].requires_grad and results["fwd"].requires_grad
    torch.testing.assert_close(results["inference"], results["fwd"])
    expected = [(2, 6, 5, 7), *(p.shape for p in parameters)]
    for pass_ in ("bwd", "fwd+bwd"):
        assert [g.shape for g in results[pass_]] == expected
    for one, other in zip(results["bwd"], results["fwd+bwd"], strict=True):
        torch.testing.assert_close(one, other)


def test_both_layouts_hold_the_same_numbers() -> None:
    bench = Workbench(SHAPE, "fp32", "channels_last", "fwd")
    nchw, channels_last = bench.inputs("nchw")[0], bench.inputs("channels_last")[0]
    assert nchw[0].is_contiguous() and not channels_last[0].is_contiguous()
    for one, other in zip(nchw, channels_last, strict=True):
        assert torch.equal(one, other)


def swapped_axes(block: SMLPBlock) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            fuse = block.fuse.weight.clone()
            fuse[:, :12] = fuse[:, :12].roll(6, dims=1)
        return torch.func.functional_call(block, {"fuse.weight": fuse}, x)

    return call


def wrong_gradient(block: SMLPBlock) -> Callable[[Tensor], Tensor]:
    """Of x: what is added is zero, but its gradient is not."""
    return lambda x: block(x) + (x - x.detach())


WRONG = {
    "swapped axes": (swapped_axes, "inference", "output: largest error"),
    "wrong gradient": (wrong_gradient, "fwd+bwd", "gradient of x: largest error"),
    "NaN": (lambda block: lambda x: block(x) * float("nan"), "fwd", "output: 420 values not fin"),
    "coarse": (lambda block: lambda x: block(x) * (1 + 4e-6), "inference", "output: largest error"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_never_timed_and_the_others_are(name: str) -> None:
    build, pass_, message = WRONG[name]
    providers = [Provider("wrong", build), PROVIDERS["handwritten"]]
    with open_workbench(SHAPE, "fp32", "channels_last", pass_, providers) as bench:
        for _ in range(2):  # nor when it is asked for again
            with pytest.raises(WrongResultError, match=rf"odd .* is not fp32: .*{message}"):
                bench.steps("wrong")
        assert bench.steps("handwritten") and "wrong" not in bench.errors


def test_what_a_provider_raises_is_told() -> None:
    def build(block: SMLPBlock) -> Callable[[Tensor], Tensor]:
        raise RuntimeError("no such kernel")

    with (
        open_workbench(SHAPE, "fp32", "nchw", "fwd", [Provider("wrong", build)]) as bench,
        pytest.raises(RuntimeError, match="no such kernel"),
    ):
        bench.steps("wrong")


def test_compilation_is_timed() -> None:
    slow = Provider("slow", lambda block: block, compiled=True)
    with open_workbench(SHAPE, "fp32", "nchw", "fwd", [slow, PROVIDERS["handwritten"]]) as bench:
        assert list(bench.compile_seconds) == ["slow"]


def test_bad_arguments_are_named() -> None:
    for arguments, message in (
        (("int8", "nchw", "fwd"), r"dtype: expected one of bf16.*got 'int8'"),
        (("bf16", "blocked", "fwd"), r"layout: expected one of channels_last.*got 'blocked'"),
        (("bf16", "nchw", "sideways"), r"pass_: expected one of inference.*got 'sideways'"),
    ):
        with pytest.raises(ValueError, match=message):
            Workbench(SHAPE, *arguments)
