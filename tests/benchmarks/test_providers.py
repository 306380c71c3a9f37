"""Every provider that runs here agrees with the block, and a wrong one is caught before timing."""

import pytest
import torch

from benchmarks.providers import (
    PROVIDERS,
    WrongResultError,
    check,
    gradient_targets,
    results_of,
    run_oracle,
    select,
)
from benchmarks.shapes import LAYOUTS
from smlp import SMLPBlock

HERE = [provider for provider in PROVIDERS.values() if not provider.gpu_only]


def _case(layout: str, fuse_bias: bool = True):
    torch.manual_seed(0)
    block = SMLPBlock(5, 7, 6, fuse_bias=fuse_bias)
    x = torch.randn(3, 6, 5, 7).to(memory_format=LAYOUTS[layout]).requires_grad_()
    return block, x, torch.randn(3, 6, 5, 7)


@pytest.mark.parametrize("fuse_bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", HERE, ids=lambda provider: provider.name)
def test_agrees_with_the_oracle(provider, layout: str, fuse_bias: bool) -> None:
    block, x, grad_output = _case(layout, fuse_bias)
    oracle = run_oracle(block, x, grad_output)
    call, targets = provider.build(block), gradient_targets(block, x)
    errors = check(provider, results_of(call, targets, grad_output), oracle, "fp32")
    results = results_of(call, targets, grad_output, backward=False)
    inference = check(provider, results, oracle, "fp32")
    assert set(inference) == {"output"}
    assert set(errors) == {"output", "d x"} | {f"d {name}" for name, _ in block.named_parameters()}


def test_a_swapped_axis_is_caught() -> None:
    block, x, grad_output = _case("nchw")
    oracle = run_oracle(block, x, grad_output)
    wrong = SMLPBlock(5, 7, 6)
    wrong.load_state_dict(block.state_dict())
    with torch.no_grad():
        wrong.fuse.weight[:, :12] = wrong.fuse.weight[:, :12].roll(6, dims=1)
    results = results_of(wrong, {"x": x}, grad_output, backward=False)
    with pytest.raises(WrongResultError, match="eager_nchw: output is off by"):
        check(PROVIDERS["eager_nchw"], results, oracle, "fp32")


def test_a_wrong_gradient_is_caught_although_the_output_is_right() -> None:
    block, x, grad_output = _case("nchw")
    oracle = run_oracle(block, x, grad_output)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        nothing = x - x.detach()  # zero, but its gradient is not
        return block(x) + nothing

    results = results_of(wrong, gradient_targets(block, x), grad_output)
    with pytest.raises(WrongResultError, match="eager_nchw: d x is off by"):
        check(PROVIDERS["eager_nchw"], results, oracle, "fp32")


def test_nan_is_caught() -> None:
    block, x, grad_output = _case("nchw")
    oracle = run_oracle(block, x, grad_output)
    results = results_of(lambda x: block(x) * float("nan"), {"x": x}, grad_output, backward=False)
    with pytest.raises(WrongResultError, match="off by nan"):
        check(PROVIDERS["eager_nchw"], results, oracle, "fp32")


def test_a_small_error_that_rounding_does_not_explain_is_caught() -> None:
    block, x, grad_output = _case("nchw")
    oracle = run_oracle(block, x, grad_output)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return block(x) * (1 + 4e-6)  # two fifths of what an arithmetic of this type may be off by

    results = results_of(wrong, {"x": x}, grad_output, backward=False)
    with pytest.raises(WrongResultError, match="eager_nchw: output is not fp32, largest error"):
        check(PROVIDERS["eager_nchw"], results, oracle, "fp32")


def test_selection() -> None:
    assert [provider.name for provider in select(["fused", "compiled"])] == ["fused", "compiled"]
    assert select(["all"]) == list(PROVIDERS.values())
    with pytest.raises(ValueError, match=r"providers: expected one of eager_nchw.*'cudnn'"):
        select(["cudnn"])


def test_nhwc_reference_is_not_offered_for_nchw_input() -> None:
    assert "convert x" in (PROVIDERS["eager_nhwc"].why_not("nchw") or "")
    assert PROVIDERS["eager_nchw"].why_not("channels_last") is None


def test_the_interpreter_is_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("smlp_kernels.launch.INTERPRETED", True)
    assert "interpreter" in (PROVIDERS["fused"].why_not("nchw") or "")
    monkeypatch.setattr("smlp_kernels.launch.INTERPRETED", False)
    assert PROVIDERS["fused"].why_not("nchw") is None


def test_the_oracle_records_gradients_also_where_the_caller_does_not() -> None:
    block, x = SMLPBlock(3, 2, 4), torch.randn(1, 4, 3, 2)
    expected = run_oracle(block, x, torch.ones_like(x))
    with torch.no_grad():
        actual = run_oracle(block, x, torch.ones_like(x))
    names = {"output", "d x", *(f"d {name}" for name, _ in block.named_parameters())}
    for one, other in zip(actual, expected, strict=True):
        assert set(one) == names
        assert all(torch.equal(value, other[name]) for name, value in one.items())
