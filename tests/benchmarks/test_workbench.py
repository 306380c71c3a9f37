"""What the workbench builds on a machine without a GPU, and what it refuses."""

import pytest
import torch

from benchmarks import workbench
from benchmarks.providers import PROVIDERS, Provider, WrongResultError
from benchmarks.shapes import Shape
from benchmarks.workbench import CompileBudget, CompileBudgetError, Workbench

SHAPE = Shape("odd", 2, 6, 5, 7)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return Workbench(SHAPE, "fp32", "channels_last")


def test_every_pass_returns_what_it_should(bench: Workbench) -> None:
    results = {
        pass_: bench.steps(PROVIDERS["eager_nchw"], pass_)[0]()
        for pass_ in ("inference", "fwd", "bwd", "fwd+bwd")
    }
    parameters = dict(bench.block.named_parameters())
    assert not results["inference"].requires_grad and results["fwd"].requires_grad
    torch.testing.assert_close(results["inference"], results["fwd"])
    expected = [(2, 6, 5, 7), *(p.shape for p in parameters.values())]
    for pass_ in ("bwd", "fwd+bwd"):
        assert [g.shape for g in results[pass_]] == expected
    for one, other in zip(results["bwd"], results["fwd+bwd"], strict=True):
        torch.testing.assert_close(one, other)


def test_both_layouts_hold_the_same_numbers(bench: Workbench) -> None:
    nchw, channels_last = bench.inputs("nchw")[0], bench.inputs("channels_last")[0]
    assert nchw[0].is_contiguous() and not channels_last[0].is_contiguous()
    for one, other in zip(nchw, channels_last, strict=True):
        assert torch.equal(one, other)


def test_a_wrong_provider_is_never_timed_and_its_failure_remembered(bench: Workbench) -> None:
    built = []

    def build(block):
        built.append(block)
        return lambda x: block(x) + 1

    wrong = Provider("wrong", build)
    for _ in range(2):
        with pytest.raises(WrongResultError, match="wrong: output is off"):
            bench.steps(wrong, "fwd")
    assert len(built) == 1


def test_compilation_stops_when_its_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 7.0])
    monkeypatch.setattr(workbench.time, "perf_counter", lambda: next(clock))
    budget, slow = CompileBudget(5.0), PROVIDERS["compiled"]
    with budget.charge(slow):
        pass
    assert budget.spent == 7.0
    used_up = pytest.raises(CompileBudgetError, match=r"compiled: the 5 s .* are used up")
    with used_up, budget.charge(slow):
        pass


def test_eager_providers_cost_no_compile_budget() -> None:
    budget = CompileBudget(0.0)
    with budget.charge(PROVIDERS["eager_nchw"]):
        pass
    assert budget.spent == 0.0


def test_bad_arguments_are_named(bench: Workbench) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of bf16.*got 'int8'"):
        Workbench(SHAPE, "int8", "nchw")
    with pytest.raises(ValueError, match=r"layout: expected one of channels_last.*got 'blocked'"):
        Workbench(SHAPE, "bf16", "blocked")
    with pytest.raises(ValueError, match=r"pass_: expected one of inference.*got 'sideways'"):
        bench.steps(PROVIDERS["eager_nchw"], "sideways")
