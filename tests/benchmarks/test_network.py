"""The network's steps train, and fused and plain models are told apart, on a tiny network."""

import copy
from functools import partial

import pytest
import torch

from benchmarks import network
from benchmarks.network import inference_step, measure, training_step
from benchmarks.timing import Samples
from smlp import SparseMLP


def _case() -> tuple[SparseMLP, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = SparseMLP(image_size=32, num_classes=5, d_model=4, depth=(1, 1, 1, 1))
    return model, torch.randn(2, 3, 32, 32), torch.tensor([1, 4])


def test_a_step_changes_the_parameters_and_leaves_no_gradients() -> None:
    model, images, labels = _case()
    before = copy.deepcopy(model.state_dict())
    training_step(model, model, images, labels)()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > len(list(model.parameters())) / 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inference_records_nothing() -> None:
    model, images, _ = _case()
    logits = inference_step(model, images)()
    assert logits.shape == (2, 5) and not logits.requires_grad


def test_speedup_is_plain_over_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def invented(clocks, rounds):
        return {"plain": Samples(9000.0, 0.1), "fused": Samples(6000.0, 0.1)}

    monkeypatch.setattr(network.timing, "interleaved", invented)
    ran = []
    found = measure({name: lambda: ran.append(1) for name in ("plain", "fused")})
    assert found["milliseconds"] == {"plain": 9.0, "fused": 6.0}
    assert found["speedup"] == pytest.approx(1.5) and len(ran) >= 6


def run(monkeypatch: pytest.MonkeyPatch, swap, compiled: bool = False) -> dict:
    small = partial(SparseMLP, image_size=32, d_model=4, depth=(1, 1, 1, 1))
    monkeypatch.setattr("smlp.SparseMLP", small)
    monkeypatch.setattr("smlp_kernels.fuse_model", swap)  # bf16 needs a GPU
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(network, "IMAGES", (2, 3, 32, 32))
    monkeypatch.setattr(network, "ROUNDS", 1)
    found: dict = {}
    for part in network.network(compiled=compiled, device="cpu"):
        found |= part
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_the_whole_measurement(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    found = run(monkeypatch, lambda model: 4, compiled)
    assert found["blocks_swapped"] == 4 and found["logits_difference"] == 0.0
    assert set(found["training"]["milliseconds"]) == {"plain", "fused"}
    assert found["training"]["speedup"] > 0
    assert ("inference" in found) is not compiled


def test_models_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(model: torch.nn.Module) -> int:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        return 4

    assert run(monkeypatch, swap)["logits_difference"] > 0.1
