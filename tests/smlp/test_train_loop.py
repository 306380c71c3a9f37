"""Whole training runs on real digits: against a loop written out here, and refused."""

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import smlp
from smlp.data import digits
from smlp.train import TrainConfig, checkpoint, loop, models, train
from smlp.train.loaders import epoch_shares
from smlp.train.loop import _step
from smlp.train.models import load_network
from smlp.train.parallel import World
from smlp.train.run import build
from tests.smlp.train_runs import SMALL, losses

pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))


def test_losses_are_those_of_a_loop_written_out(tmp_path: Path) -> None:
    config = replace(
        SMALL, out=str(tmp_path), model="sparse_mlp", epochs=1, warmup_epochs=0, ema_decay=0.0
    )
    train(config)

    split = digits()
    torch.manual_seed(0)
    model = smlp.SparseMLP(8, 1, 1, 10, d_model=8, depth=(2, 1))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    adam.param_groups[0]["weight_decay"] = 0.05
    expected = []
    for step, share in enumerate(epoch_shares(1437, 128, seed=0, epoch=0, world=ALONE)):
        turn = torch.tensor(torch.pi * step / 11, dtype=torch.float64)
        for group in adam.param_groups:
            group["lr"] = 1e-5 + (2e-3 - 1e-5) * (1 + turn.cos().item()) / 2
        logits = model(split.train_images[share])
        one_hot = nn.functional.one_hot(split.train_labels[share], 10)
        target = 0.9 * one_hot + 0.1 / 10
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, 1.0 / norm.item()))
        adam.step()
        expected.append(loss.item())
    assert len(expected) == 11
    assert losses(tmp_path) == pytest.approx(expected, rel=2e-4)


def test_averaged_weights_follow_their_recursion() -> None:
    config = replace(SMALL, ema_decay=0.5)
    run = build(config, _Source(), ALONE)
    run.model.train()
    split, expected, decays = digits(), None, []
    for step, share in enumerate(list(epoch_shares(1437, 128, 0, 0, ALONE))[:4]):
        _step(run, split.train_images[share], split.train_labels[share], config, ALONE)
        now = {name: p.detach().double() for name, p in run.model.named_parameters()}
        if expected is None:
            expected = now
            continue
        decay = min(0.5, 1 - (1 + step) ** (-2 / 3))  # as timm warms it up
        decays.append(decay)
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    assert decays[0] < decays[-1] == 0.5
    assert run.ema is not None and expected is not None
    for name, parameter in run.ema.module.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], msg=name)
    for name, buffer in run.ema.module.named_buffers():
        assert torch.equal(buffer, run.model.get_buffer(name)), name


class _Source:
    image_size, in_channels, classes = (8, 8), 1, [*"0123456789"]
    train_labels, test_labels = digits().train_labels.tolist(), digits().test_labels.tolist()


def test_the_written_weights_rebuild_the_network_and_its_accuracy(tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path), epochs=2, progress=False, device="cpu")
    summary = train(config)
    assert summary.held_out.accuracy > 0.8
    trained = load_network(tmp_path / "model.pt")
    model = trained.network
    assert isinstance(model, smlp.SparseMLP) and not model.training
    split = digits()
    assert (trained.mean, trained.std) == ([split.mean], [split.std])
    with torch.no_grad():
        logits = model(split.test_images)
    right = (logits.argmax(1) == split.test_labels).sum().item()
    assert right == round(summary.held_out.accuracy * 360)
    expected = cross_entropy(logits, split.test_labels).item()
    assert summary.held_out.loss == pytest.approx(expected, rel=1e-5)
    assert trained.classes == [*"0123456789"] and trained.data == "digits"


def test_frozen_batchnorm_keeps_its_statistics(tmp_path: Path) -> None:
    train(replace(SMALL, out=str(tmp_path), epochs=1, warmup_epochs=0, freeze_bn=True))
    saved = checkpoint.load(tmp_path / "last.pt")["model"]
    means = [value for name, value in saved.items() if name.endswith("running_mean")]
    assert means and not any(mean.any() for mean in means)


def test_bf16_autocast_in_channels_last_stays_near_fp32(tmp_path: Path) -> None:
    config = replace(SMALL, model="sparse_mlp", epochs=1, warmup_epochs=0, ema_decay=0.0)
    train(replace(config, out=str(tmp_path / "fp32")))
    train(replace(config, out=str(tmp_path / "bf16"), amp="bf16", channels_last=True))
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_compiled_it_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward  # inductor would take minutes, and round differently

    compile_with = functools.partialmethod(nn.Module.compile, backend=backend)
    monkeypatch.setattr(nn.Module, "compile", compile_with)
    train(replace(SMALL, out=str(tmp_path / "eager")))
    assert not graphs
    train(replace(SMALL, out=str(tmp_path / "compiled"), compile=True))
    assert graphs
    assert losses(tmp_path / "compiled") == losses(tmp_path / "eager")


@pytest.mark.usefixtures("declared_entry_points")
def test_fused_blocks_train_to_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("smlp_kernels")
    options = "--epochs 1 --warmup-epochs 0 --d-model 8 --depth 2,1 --batch-size 128 --no-progress"
    # In Triton's interpreter, which the tests of the kernels turn on, this would take hours.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "smlp.train", *options.split(), "--device", "cpu"]
    command += ["--label-smoothing", "0.1", "--clip-grad", "1", "--fused", "--out"]
    subprocess.run([*command, str(tmp_path / "fused")], env=environment, check=True)
    config = replace(SMALL, model="sparse_mlp", epochs=1, warmup_epochs=0, ema_decay=0.0)
    train(replace(config, out=str(tmp_path / "reference")))
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "reference"), rel=1e-5)
    weights = [
        checkpoint.load(tmp_path / n / "model.pt")["state_dict"] for n in ("fused", "reference")
    ]
    assert weights[0].keys() == weights[1].keys()


def test_fused_blocks_that_nothing_declares_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "entry_points", lambda group: EntryPoints())
    monkeypatch.delattr(loop, "open_source")
    config = replace(SMALL, out=str(tmp_path / "out"), fused=True)
    with pytest.raises(ImportError, match=r"fused: expected an installed .* smlp\.fuse, got none"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_blocks_are_swapped_if_asked_for_by_what_is_given_or_else_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = EntryPoints([EntryPoint("any", "math:sqrt", "smlp.fuse")])
    monkeypatch.setattr(models, "entry_points", lambda group: declared.select(group=group))
    used = []

    def build_and_stop(*arguments: object) -> None:
        used.append(arguments[-1])
        raise NotImplementedError

    monkeypatch.setattr(loop, "build", build_and_stop)
    for fused, given in ((False, math.cbrt), (True, math.cbrt), (True, None)):
        with pytest.raises(NotImplementedError):
            train(replace(SMALL, out=str(tmp_path), fused=fused), fuse=given)
    assert used == [None, math.cbrt, math.sqrt]

    swapped: list[nn.Module] = []
    arguments = {"image_size": 8, "patch_size": 1, "in_channels": 1, "num_classes": 10}
    model = models.build_model(
        "sparse_mlp", {**arguments, "d_model": 4, "depth": (1,)}, swapped.append
    )
    assert swapped == [model]


def test_a_diverged_run_stops_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"at step \d+ \(lr .*a lower --lr"):
        train(replace(SMALL, out=str(tmp_path), lr=1e12, clip_grad=0.0, warmup_epochs=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "no/such/folder"}, "data: expected digits, mnist5k or a folder holding train/"),
        ({"device": "tpu"}, "device: expected auto, cpu or cuda, got 'tpu'"),
        ({"batch_size": 2000}, "batch_size: expected at most the 1437 training images, got 2000"),
        ({"patch_size": 3}, "image_size: expected a height divisible by 6"),
        ({"sync_bn": True}, "sync_bn: expected a CUDA device, got cpu"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        train(replace(SMALL, out=str(out), **options))  # type: ignore[arg-type]
    assert not out.exists()


def test_a_missing_torchvision_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    for name in ("torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install torchvision"):
        train(replace(SMALL, data=str(tmp_path), out=str(tmp_path / "out")))
