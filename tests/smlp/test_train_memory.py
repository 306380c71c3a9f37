"""Ways to need less memory: they change what is kept, not what is computed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smlp import SMLPBlock
from smlp.data import digits
from smlp.train import checkpoint, loop, train
from smlp.train.loaders import InMemory
from smlp.train.loop import _step
from smlp.train.parallel import World
from smlp.train.run import build
from tests.smlp.train_runs import SMALL, losses

pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("parts", [4, 3])  # 128 images: equal parts, and parts of 43, 43 and 42
def test_a_step_in_parts_is_the_same_step(parts: int, tmp_path: Path) -> None:
    # BatchNorm sees each part alone, so that with stored statistics only all is the same
    config = replace(SMALL, model="sparse_mlp", epochs=1, freeze_bn=True)
    train(replace(config, out=str(tmp_path / "whole")))
    train(replace(config, out=str(tmp_path / "parts"), accumulate=parts))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    whole, in_parts = (
        checkpoint.load(tmp_path / n / "last.pt")["model"] for n in ("whole", "parts")
    )
    for name, value in whole.items():
        torch.testing.assert_close(in_parts[name], value, rtol=1e-2, atol=2e-4, msg=name)


def test_a_part_is_what_the_network_gets() -> None:
    source = InMemory(digits(), SMALL, ALONE)
    config = replace(SMALL, accumulate=3)
    run = build(config, source, ALONE)
    seen: list[int] = []
    run.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    _step(run, *next(source.train_batches(0, 0)), config, ALONE)
    assert seen == [43, 43, 42]


@pytest.mark.parametrize("model", ["smlpnet_small", "sparse_mlp"])  # the first drops paths
def test_layers_computed_again_train_to_the_bit(model: str, tmp_path: Path) -> None:
    config = replace(SMALL, model=model, epochs=1)
    train(replace(config, out=str(tmp_path / "kept")))
    train(replace(config, out=str(tmp_path / "again"), grad_checkpointing=True))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    kept, again = (checkpoint.load(tmp_path / n / "last.pt") for n in ("kept", "again"))
    for part in ("model", "ema"):
        assert kept[part].keys() == again[part].keys()
        for name, value in kept[part].items():  # BatchNorm's statistics and counters, too
            assert torch.equal(again[part][name], value), name


@pytest.mark.parametrize(
    ("model", "ablation"),
    [("smlpnet_small", "none"), ("smlpnet_small", "sum"), ("sparse_mlp", "none")],
)
def test_only_what_enters_a_layer_is_kept(model: str, ablation: str) -> None:
    source = InMemory(digits(), SMALL, ALONE)
    images = source.test_batches().__next__()[0]
    sizes = []
    for again in (False, True):
        config = replace(SMALL, model=model, ablation=ablation, grad_checkpointing=again)
        run = build(config, source, ALONE)
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, kept: dict = kept) -> torch.Tensor:  # type: ignore[type-arg]
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run.model(images)
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    assert sizes[1] < sizes[0] / 3


def test_blocks_run_twice(tmp_path: Path) -> None:
    config = replace(SMALL, grad_checkpointing=True, ema_decay=0.0)
    source = InMemory(digits(), config, ALONE)
    run = build(config, source, ALONE)
    calls: list[str] = []
    for name, module in run.model.named_modules():
        if isinstance(module, SMLPBlock):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    _step(run, *next(source.train_batches(0, 0)), config, ALONE)
    assert len(calls) == 6 and all(calls.count(name) == 2 for name in calls)


def test_float16_stays_near_float32(tmp_path: Path) -> None:
    config = replace(SMALL, model="sparse_mlp", epochs=1)
    train(replace(config, out=str(tmp_path / "fp32")))
    train(replace(config, out=str(tmp_path / "fp16"), amp="fp16"))
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "fp16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    scaler = checkpoint.load(tmp_path / "fp16" / "last.pt")["scaler"]
    assert scaler["scale"] > 1
    assert checkpoint.load(tmp_path / "fp32" / "last.pt")["scaler"] == {}


def test_what_is_clipped_is_the_gradient_of_the_loss_without_its_scale() -> None:
    clipped = []
    for amp in ("none", "fp16"):
        config = replace(SMALL, model="sparse_mlp", amp=amp, clip_grad=0.1, ema_decay=0.0)
        source = InMemory(digits(), config, ALONE)
        run = build(config, source, ALONE)
        _step(run, *next(source.train_batches(0, 0)), config, ALONE)
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        clipped.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert clipped[0].norm().item() == pytest.approx(0.1, rel=1e-4)
    assert (clipped[1] - clipped[0]).norm() < 0.02 * clipped[0].norm()


def test_gradients_beyond_float16_skip_the_step_and_lower_the_scale() -> None:
    config = replace(SMALL, amp="fp16", ema_decay=0.0)
    source = InMemory(digits(), config, ALONE)
    run = build(config, source, ALONE)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    _, loss = _step(run, *next(source.train_batches(0, 0)), config, ALONE)
    assert loss.isfinite()
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**59


def test_a_run_that_skips_every_step_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(run: Any, *arguments: Any) -> Any:
        handle = next(run.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
        outcome = _step(run, *arguments)
        handle.remove()
        return outcome

    monkeypatch.setattr(loop, "_step", overflow)
    config = replace(SMALL, amp="fp16", epochs=4, model="sparse_mlp", d_model=4)
    with pytest.raises(FloatingPointError, match="gradients overflow float16 at every scale"):
        train(replace(config, out=str(tmp_path)))
