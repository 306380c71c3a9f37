"""Interrupted runs: continued they are the same to the bit, and never mixed with another."""

import csv
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import smlp
from smlp import data
from smlp.cli import main
from smlp.train import TrainConfig, checkpoint, loop, train
from smlp.train.loop import _step
from smlp.train.models import load_network
from smlp.train.run import _start_from
from tests.smlp.train_runs import SMALL, TINY

pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(replace(SMALL, out=str(out)))
    return out


def test_killed_and_continued_it_writes_the_same_losses_and_weights(
    tmp_path: Path, uninterrupted: Path
) -> None:
    options = (
        "--model smlpnet_small --d-model 8 --depth 2,1 --epochs 2 --batch-size 128 --ema-decay 0.9 "
        "--label-smoothing 0.1 --clip-grad 1 --no-progress --device cpu --checkpoint-every 3"
    )
    command = [sys.executable, "-m", "smlp.train", "--out", str(tmp_path), *options.split()]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "last.pt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = checkpoint.load(tmp_path / "last.pt")["step"]
    assert 0 < stopped < 22

    train(replace(SMALL, out=str(tmp_path), resume=True, checkpoint_every=3))
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("stop", [4, 11, 15])
def test_continued_from_any_step_it_is_the_same_run(
    stop: int, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, out=str(tmp_path), checkpoint_every=stop)
    taken = 0

    def interrupted_step(*args: object) -> object:
        nonlocal taken
        taken += 1
        if taken == stop + 3:
            raise KeyboardInterrupt
        return _step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last.pt")["step"] == stop
    torch.manual_seed(999)  # the continuation must not depend on what a new process has drawn
    train(replace(config, resume=True))
    assert_same_run(tmp_path, uninterrupted)


def assert_same_run(out: Path, expected: Path) -> None:
    """Losses as written in the log, results per epoch, and weights: the same to the bit."""
    assert (out / "log.csv").read_text() == (expected / "log.csv").read_text()
    for mine, theirs in zip(_rows(out / "epochs.csv"), _rows(expected / "epochs.csv"), strict=True):
        assert mine.pop("seconds") and theirs.pop("seconds")
        train_losses = float(mine.pop("train_loss")), float(theirs.pop("train_loss"))
        assert train_losses[0] == pytest.approx(train_losses[1], rel=1e-12)  # a sum in two parts
        assert mine == theirs
    for name in ("model.pt", "last.pt"):
        mine, theirs = checkpoint.load(out / name), checkpoint.load(expected / name)
        key = "state_dict" if name == "model.pt" else "model"
        assert mine[key].keys() == theirs[key].keys()
        for parameter, value in theirs[key].items():
            assert torch.equal(mine[key][parameter], value), parameter


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_run_is_only_evaluated_again(uninterrupted: Path) -> None:
    before = (uninterrupted / "log.csv").read_text()
    summary = train(replace(SMALL, out=str(uninterrupted), resume=True))
    assert summary.steps == 22
    assert (uninterrupted / "log.csv").read_text() == before
    kept = checkpoint.load(uninterrupted / "model.pt")["result"]
    assert asdict(summary.held_out) == kept
    weights = (uninterrupted / "model.pt").read_bytes()
    (uninterrupted / "model.pt").unlink()
    train(replace(SMALL, out=str(uninterrupted), resume=True))  # written again, from last.pt
    assert (uninterrupted / "model.pt").read_bytes() == weights


def test_a_run_is_neither_overwritten_nor_continued_with_other_options(
    uninterrupted: Path, tmp_path: Path
) -> None:
    config = replace(SMALL, out=str(uninterrupted))
    with pytest.raises(ValueError, match=r"out: expected a folder without a run, .*last\.pt"):
        train(config)
    with pytest.raises(
        ValueError, match=r"resume: .*got lr 0\.1 instead of 0\.002; seed 5 instead of 0"
    ):
        train(replace(config, resume=True, lr=0.1, seed=5))
    checkpoint.save(tmp_path / "last.pt", {"step": 3})
    with pytest.raises(
        ValueError, match=r"resume: expected a checkpoint .* without config, images"
    ):
        train(replace(SMALL, out=str(tmp_path), resume=True))


def test_only_trained_weights_are_taken_for_them(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: expected .* No such file"):
        load_network(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"the model\.pt of a run .*last\.pt without arguments, c"):
        load_network(uninterrupted / "last.pt")


def test_options_need_not_be_typed_again_and_epochs_can_be_added(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    command = ["train", "--resume", "--out", str(out)]
    assert main([*command, "--seed", "7"]) == 2
    assert (
        "resume: expected the options of the run, got seed 7 instead of 0"
        in capsys.readouterr().err
    )
    assert main([*command, "--epochs", "1"]) == 2
    assert (
        "epochs: expected at least the 2 that the run has begun, got 1" in capsys.readouterr().err
    )
    assert checkpoint.load(out / "last.pt")["step"] == 22

    assert main([*command, "--epochs", "3"]) == 0
    typed = shutil.copytree(uninterrupted, tmp_path / "typed")
    train(replace(SMALL, out=str(typed), epochs=3, resume=True))
    assert_same_run(out, typed)
    rates = [float(row["lr"]) for row in _rows(out / "log.csv")]
    assert rates[21] < 1e-4 < rates[22]  # from here on along the cosine of three epochs
    assert main(command) == 0  # and three epochs are the run's own now
    assert checkpoint.load(out / "last.pt")["step"] == 33


def test_without_a_checkpoint_it_says_that_it_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smlp")
    for started in (True, False):
        assert main(["train", "--resume", *TINY.split(), "--out", str(tmp_path)]) == 0
        assert (f"no checkpoint to continue from in {tmp_path}: " in caplog.text) == started
        caplog.clear()


def test_a_folder_with_another_name_is_the_same_run(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert train(replace(SMALL, out="moved", resume=True)).steps == 22


def test_paths_spelt_otherwise_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = TrainConfig(data=str(tmp_path / "images"), init=str(tmp_path / "model.pt"))
    relative = TrainConfig(data="./x/../images/", init="model.pt")
    assert relative.as_saved() == absolute.as_saved()
    assert relative.course() == replace(absolute, data="moved").course()
    assert TrainConfig(data="digits").as_saved()["data"] == "digits"


@pytest.mark.parametrize("part", ["train", "held out"])
def test_other_images_under_the_same_name_are_refused(
    part: str, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = data.digits()
    prefix = "train" if part == "train" else "test"
    fewer = {
        f"{prefix}_{name}": getattr(split, f"{prefix}_{name}")[:300]
        for name in ("images", "labels")
    }
    monkeypatch.setattr(data, "digits", lambda: replace(split, **fewer))
    before = {path.name: path.read_bytes() for path in uninterrupted.glob("*.*")}
    with pytest.raises(ValueError, match=f"data: expected .*: {part} .* instead of "):
        train(replace(SMALL, out=str(uninterrupted), resume=True, epochs=3))
    assert {path.name: path.read_bytes() for path in uninterrupted.glob("*.*")} == before


def test_a_run_starts_from_weights(tmp_path: Path, uninterrupted: Path) -> None:
    init = tmp_path / "model.pt"
    shutil.copy(uninterrupted / "model.pt", init)
    still = replace(SMALL, epochs=1, ema_decay=0.0, lr=1e-30, min_lr=0.0, freeze_bn=True)
    train(replace(still, out=str(tmp_path / "out"), init=str(init)))
    written = checkpoint.load(tmp_path / "out" / "model.pt")["state_dict"]
    for name, value in checkpoint.load(init)["state_dict"].items():
        assert torch.equal(written[name], value), name
    init.unlink()  # a continuation does not read it
    train(replace(still, out=str(tmp_path / "out"), init=str(init), resume=True, epochs=2))
    with pytest.raises((ValueError, OSError), match=r"model\.pt"):
        train(replace(still, out=str(tmp_path / "new"), init=str(init)))


def test_weights_for_other_classes_leave_the_head_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs, ours = (smlp.SMLPNet(8, 1, 1, n, d_model=4, depth=(1, 1)) for n in (3, 5))
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    head = {name: value.clone() for name, value in ours.mlp_head.state_dict().items()}
    _start_from(ours, str(tmp_path / "weights.pt"))
    for name, value in ours.state_dict().items():
        if name.startswith(f"mlp_head.{len(ours.mlp_head) - 1}."):
            assert torch.equal(value, head[name.removeprefix("mlp_head.")])
        else:
            assert torch.equal(value, theirs.state_dict()[name]), name
    other = smlp.SMLPNet(8, 1, 1, 3, d_model=4, depth=(2, 1))
    with pytest.raises(ValueError, match="init: expected a checkpoint that fits the model"):
        _start_from(other, str(tmp_path / "weights.pt"))
