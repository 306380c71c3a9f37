"""The parts of training, each against its definition."""

import argparse
import math
import os
import sys
import types
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from smlp import SMLPBlock, SparseMLP
from smlp.train import TrainConfig, checkpoint, parallel
from smlp.train.cli import add_arguments
from smlp.train.evaluate import evaluate
from smlp.train.image_folder import Seeded
from smlp.train.loaders import InMemory, epoch_shares, held_out_shares
from smlp.train.logs import Log, Table, progress
from smlp.train.parallel import World
from smlp.train.run import build_optimizer, learning_rate

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)


def test_any_number_of_processes_sees_the_same_images_at_each_step() -> None:
    alone = list(epoch_shares(103, 12, seed=3, epoch=1, world=ALONE))
    ranks = [
        list(epoch_shares(103, 12, seed=3, epoch=1, world=World(rank, 4, CPU))) for rank in range(4)
    ]
    assert len(alone) == 8
    assert [list(chain(*step)) for step in zip(*ranks, strict=True)] == alone
    seen = list(chain(*alone))
    assert len(set(seen)) == 96
    assert set(seen) <= set(range(103))


def test_an_epoch_goes_on_where_it_stopped_and_each_has_its_own_order() -> None:
    whole = list(epoch_shares(50, 5, seed=0, epoch=2, world=ALONE))
    assert list(epoch_shares(50, 5, seed=0, epoch=2, world=ALONE, first_step=7)) == whole[7:]
    assert list(epoch_shares(50, 5, seed=0, epoch=3, world=ALONE)) != whole
    assert list(epoch_shares(50, 5, seed=1, epoch=2, world=ALONE)) != whole


@pytest.mark.parametrize("size", [2, 3, 9])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 23, 24])
def test_held_out_images_are_dealt_out_once_in_equally_many_steps(count: int, size: int) -> None:
    ranks = [list(held_out_shares(count, 8, World(rank, size, CPU))) for rank in range(size)]
    steps = [sorted(chain(*step)) for step in zip(*ranks, strict=True)]
    assert steps == [list(range(i, min(i + 8, count))) for i in range(0, count, 8)]


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_the_schedule_is_a_line_and_a_cosine(warmup_epochs: int) -> None:
    config = TrainConfig(epochs=6, warmup_epochs=warmup_epochs, lr=0.5, min_lr=0.01)
    warmup, total = 7 * warmup_epochs, 42
    for step in range(total):
        if step < warmup:
            expected = 0.5 * (1e-3 + (1 - 1e-3) * step / warmup)
        else:
            turn = math.pi * (step - warmup) / (total - warmup)
            expected = 0.01 + (0.5 - 0.01) * (1 + math.cos(turn)) / 2
        assert learning_rate(config, 7, step) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("warmup_epochs", [1, 5])
def test_warmup_is_half_of_a_run_that_is_no_longer(warmup_epochs: int) -> None:
    config = TrainConfig(epochs=1, warmup_epochs=warmup_epochs, lr=0.5, min_lr=0.0)
    rates = [learning_rate(config, 8, step) for step in range(8)]
    assert max(rates) == rates[4] == 0.5
    assert learning_rate(config, 1, 0) == 0.5  # a single step


def test_weight_decay_leaves_biases_and_normalisations_alone() -> None:
    model = SparseMLP(8, 2, 1, 4, d_model=4, depth=(1, 1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.3))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_norm = isinstance(owner, (nn.BatchNorm2d, nn.LayerNorm))
        kept = 1.0 if is_norm or name.endswith("bias") else 1 - 0.1 * 0.3
        torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)


def test_evaluation_counts_every_image_once_and_restores_the_mode() -> None:
    from smlp.data import ImageSplit

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(37, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (37,), generator=generator)
    split = ImageSplit("random", images, labels, images, labels, 3, 0.0, 1.0)
    config = TrainConfig(batch_size=8)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    model(images)  # moves the stored statistics away from 0 and 1
    model[2].eval()
    loss, accuracy = evaluate(model, InMemory(split, config, ALONE).test_batches(), ALONE)
    assert [module.training for module in model] == [True, True, False, True]

    norm, linear = model[0], model[3]
    x = (images - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    logits = (x.flatten(1) @ linear.weight.T + linear.bias).double()
    right = logits.softmax(1)[torch.arange(37), labels]
    assert loss == pytest.approx(-right.log().mean().item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_layers_to_shard_are_the_largest_with_one_block() -> None:
    model = SparseMLP(16, 1, 1, 3, d_model=4, depth=(2, 1))
    layers = parallel.layers_with_one_block(model)
    assert layers == [model.layers[0].model[0], model.layers[0].model[1], model.layers[1]]
    blocks = [m for layer in layers for m in layer.modules() if isinstance(m, SMLPBlock)]
    assert blocks == [m for m in model.modules() if isinstance(m, SMLPBlock)]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1, "weights": torch.arange(4.0)})

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"step": 2, "weights": torch.zeros(4)})
    content = checkpoint.load(path)
    assert content["step"] == 1
    assert torch.equal(content["weights"], torch.arange(4.0))


class Exploit:
    """Pickles to a call of ``os.mkdir``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    torch.save({"step": Exploit(tmp_path / "hacked")}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="resume: expected a checkpoint") as error:
        checkpoint.load(tmp_path / "last.pt")
    assert "weights_only" not in str(error.value)  # torch's text says how to read it carelessly
    assert not (tmp_path / "hacked").exists()


def test_a_log_goes_on_after_its_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n4,0.")  # killed in the middle of a row
    Table(path, ("step", "loss"), last_step=2).add([{"step": 3, "loss": 0.25}])
    assert path.read_text() == "step,loss\n1,0.5\n2,0.4\n3,0.25\n"
    Table(path, ("step", "loss"), last_step=0)
    assert path.read_text() == "step,loss\n"


def test_tensorboard_gets_what_the_tables_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    class SummaryWriter:  # of tensorboard, which is optional
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    tensorboard = types.ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(tensorboard, "SummaryWriter", SummaryWriter, raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    log = Log(tmp_path, last_step=4)
    log.steps([{"step": 5, "epoch": 1, "lr": 0.1, "loss": 2.0}])
    log.epoch({"epoch": 1, "step": 5, "train_loss": 2.0, "loss": 1.5, "accuracy": 0.25})
    log.close()
    assert written == [
        (str(tmp_path / "tensorboard"), 5),
        ("train/loss", 2.0, 5),
        ("train/lr", 0.1, 5),
        ("held_out/loss", 1.5, 5),
        ("held_out/accuracy", 0.25, 5),
        "closed",
    ]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Log(tmp_path, last_step=4).close()


@pytest.mark.parametrize(("show", "terminal"), [(True, True), (True, False), (False, True)])
def test_the_progress_bar_hands_every_step_on(
    show: bool, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm", reason="needs the demo extra")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress(iter("abc"), total=3, title="epoch 1 of 2", show=show)) == list("abc")
    assert ("epoch 1 of 2" in capsys.readouterr().err) == (show and terminal)


class Noise(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(3)


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    torch.manual_seed(7)
    expected_next = torch.rand(1)
    torch.manual_seed(7)
    first = Seeded(Noise(), seed=1, epoch=2)
    forward = [first[i] for i in range(10)]
    backward = [first[i] for i in reversed(range(10))][::-1]
    assert torch.equal(torch.rand(1), expected_next)  # the global numbers were left alone
    assert all(map(torch.equal, forward, backward))
    others = [
        Seeded(Noise(), seed=1, epoch=3)[0],
        Seeded(Noise(), seed=2, epoch=2)[0],
        *forward[1:],
    ]
    assert not any(torch.equal(forward[0], other) for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": -4}, "batch_size: expected at least 1, got -4"),
        ({"model": "resnet"}, "model: expected one of sparse_mlp, .* got 'resnet'"),
        ({"amp": "fp8"}, "amp: expected one of none, bf16, fp16, got 'fp8'"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"seed": 2**64}, r"seed: expected less than 2\*\*64, got 18446744073709551616"),
        ({"resume": True, "overwrite": True}, "overwrite: expected without resume, got both"),
        ({"lr": float("nan")}, "lr: expected a finite number >= 0, got nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"min_lr": 1.0}, "min_lr: expected less than lr"),
        ({"mixup": 0.8}, "mixup: expected with an image folder only, got 0.8 with data 'digits'"),
        ({"freeze_bn": True, "sync_bn": True}, "sync_bn: expected without freeze_bn"),
        ({"data": "folder", "randaugment": 31}, "randaugment: expected a magnitude up to 30"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2.5}, r"epochs: expected an integer, got 2\.5"),
        ({"lr": "0.1"}, r"lr: expected a number, got '0\.1'"),
        ({"compile": "no"}, "compile: expected True or False, got 'no'"),
        ({"data": None}, "data: expected a name or a path, got None"),
        ({"out": None}, "out: expected a name or a path, got None"),
        ({"init": 3}, "init: expected a name or a path, got 3"),
        ({"data": "folder", "image_size": "16"}, "image_size: expected an integer, got '16'"),
    ],
)
def test_values_of_another_type_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrainConfig(**options)


def test_what_python_code_passes_is_kept_as_a_checkpoint_needs_it() -> None:
    brought: Any = {
        "out": Path("runs/x"),
        "data": Path("images"),
        "init": Path("model.pt"),
        "depth": [2, np.int64(4)],
        "epochs": np.int32(3),
        "lr": np.float64(0.1),
        "image_size": [32, 64],
    }
    plain: Any = {"out": "runs/x", "data": "images", "init": "model.pt", "depth": (2, 4)}
    config = TrainConfig(**brought)
    assert config == TrainConfig(**plain, epochs=3, lr=0.1, image_size=(32, 64))
    assert config.depth is not None
    assert {type(value) for value in (config.epochs, *config.depth)} == {int}
    assert type(config.lr) is float
    assert TrainConfig(data="images", image_size=32).image_size == (32, 32)  # type: ignore[arg-type]


def test_the_command_line_has_every_option_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert TrainConfig(**vars(parser.parse_args([]))) == TrainConfig()
    given = (
        "--data mnist5k --depth 2,4 --image-size 32x64 --lr 0.1 --fused --no-progress --epochs 3"
    )
    options = vars(parser.parse_args(given.split()))
    assert options["depth"] == (2, 4)
    assert options["image_size"] == (32, 64)
    assert parser.parse_args(["--image-size", "32"]).image_size == (32, 32)
    assert (options["data"], options["lr"], options["epochs"]) == ("mnist5k", 0.1, 3)
    assert options["fused"] and not options["progress"]
