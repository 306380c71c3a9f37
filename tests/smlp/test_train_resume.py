"""Interrupted runs: continued they are the same to the bit, and never mixed with another."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smlp.train import checkpoint, loop, train
from smlp.train.loop import _step
from smlp.train.models import load_network
from tests.smlp.train_runs import SMALL

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
    assert not (tmp_path / "model.pt").exists()

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
    for mine, theirs in zip(_epochs(out), _epochs(expected), strict=True):
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


def _epochs(out: Path) -> list[dict[str, str]]:
    with (out / "epochs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_run_is_only_evaluated_again(uninterrupted: Path) -> None:
    before = (uninterrupted / "log.csv").read_text()
    summary = train(replace(SMALL, out=str(uninterrupted), resume=True))
    assert summary.steps == 22
    assert (uninterrupted / "log.csv").read_text() == before
    assert summary.held_out.accuracy == float(_epochs(uninterrupted)[-1]["accuracy"])


def test_a_run_is_neither_overwritten_nor_continued_with_other_options(
    uninterrupted: Path, tmp_path: Path
) -> None:
    config = replace(SMALL, out=str(uninterrupted))
    with pytest.raises(ValueError, match=r"out: expected a folder without a run, .*last\.pt"):
        train(config)
    with pytest.raises(ValueError, match=r"resume: .*lr was 0\.002, now 0\.1; seed was 0, now 5"):
        train(replace(config, resume=True, lr=0.1, seed=5))
    checkpoint.save(tmp_path / "last.pt", {"step": 3})
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint .* without config, model"):
        train(replace(SMALL, out=str(tmp_path), resume=True))


def test_only_trained_weights_are_taken_for_them(tmp_path: Path, uninterrupted: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: expected .* No such file"):
        load_network(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"the model\.pt of a run .*last\.pt without arguments, m"):
        load_network(uninterrupted / "last.pt")
