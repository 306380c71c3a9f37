"""Two processes compute what one computes with the same global batch.

BatchNorm normalises each process's images by themselves, so with it the losses can only agree when
it uses stored statistics (``freeze_bn``; across GPUs ``sync_bn`` sees the whole batch). Everything
else - order of images, gradients, clipping, weight decay, average, schedule - is the same then.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smlp.train import TrainConfig, checkpoint, loop, train

pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs a torch with gloo",
    ),
]

CONFIG = TrainConfig(
    d_model=16,
    depth=(1, 1),
    epochs=2,
    batch_size=128,
    ema_decay=0.8,
    clip_grad=0.5,
    freeze_bn=True,
    progress=False,
    device="cpu",
)
OPTIONS = (
    "--d-model 16 --depth 1,1 --epochs 2 --batch-size 128 --ema-decay 0.8 --clip-grad 0.5 "
    "--freeze-bn --no-progress --device cpu"
)


def launch(
    *options: str, module: Sequence[str] = ("smlp.train",), report: str = "held-out accuracy"
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", *module, *OPTIONS.split(), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(report) == 1, done.stdout  # one process reports


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process; beside it, in ``half``, the checkpoint in the middle of an epoch."""
    out = tmp_path_factory.mktemp("alone")
    half = out / "half"
    half.mkdir()
    save = loop.state.save

    def save_and_keep(run: object, *arguments: object) -> None:
        save(run, *arguments)  # type: ignore[arg-type]
        if run.step == 14:  # type: ignore[attr-defined]
            shutil.copy(out / "last.pt", half)
            shutil.copy(out / "log.csv", half)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.state, "save", save_and_keep)
        train(replace(CONFIG, out=str(out), checkpoint_every=7))
    return out


def test_ddp_repeats_the_losses_of_one_process(alone: Path, tmp_path: Path) -> None:
    launch("--parallel", "ddp", "--accumulate", "2", "--out", str(tmp_path))
    assert_same_course(tmp_path, alone)


def test_fsdp_repeats_them_from_a_checkpoint_of_one_process(alone: Path, tmp_path: Path) -> None:
    out = shutil.copytree(alone / "half", tmp_path / "out")
    launch("--parallel", "fsdp", "--grad-checkpointing", "--out", str(out), "--resume")
    assert_same_course(out, alone)


STOPPING = """
import os, signal, sys
from smlp.train import cli, loop

def stopping(run, *arguments):
    if run.step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(run, *arguments)

step, loop._step = loop._step, stopping
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.complete
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "stopping.py").write_text(STOPPING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "stopping.py"), *OPTIONS.split(), "--checkpoint-every", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "smlp train: stopped by SIGTERM after step 6 of 22 and saved" in done.stderr
    assert "smlp train: stopped by another process after step 6 of 22 and saved" in done.stderr
    assert checkpoint.load(tmp_path / "out" / "last.pt")["step"] == 6


@pytest.mark.usefixtures("process_group")
def test_processes_that_are_joined_stay_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun does, under a caller that trains twice
    train(replace(CONFIG, epochs=1, out=str(tmp_path)))
    assert torch.distributed.is_initialized()


@pytest.mark.complete
def test_processes_train_every_ablation_and_one_reports(tmp_path: Path) -> None:
    options = f"--model smlpnet_tiny --d-model 4 --epochs 1 --out {tmp_path / 'out'}"
    launch(*options.split(), module=("smlp", "ablations"), report="| single_stage |")
    assert (tmp_path / "out" / "ablations.md").read_text().count("%") == 8


@pytest.mark.complete
def test_stored_statistics_are_those_of_all_images(tmp_path: Path) -> None:
    options = "--no-freeze-bn --epochs 1 --warmup-epochs 0 --lr 1e-30 --min-lr 0 --out"
    launch(*options.split(), str(tmp_path / "two"))
    standing = replace(CONFIG, epochs=1, warmup_epochs=0, lr=1e-30, min_lr=0.0, freeze_bn=False)
    train(replace(standing, out=str(tmp_path / "one")))
    one, two = (checkpoint.load(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    # Weights that stand still: the first BatchNorm sees the same features in both runs, and the
    # means of two halves average to the mean of the whole.
    first = "layers.0.model.0.0.norm.running_mean"
    assert one[first].abs().max() > 0.01
    torch.testing.assert_close(two[first], one[first], rtol=1e-4, atol=1e-6)


def assert_same_course(out: Path, expected: Path) -> None:
    def columns(folder: Path, *names: str) -> list[list[float]]:
        with (folder / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [[float(row[name]) for row in rows] for name in names]

    (steps, lrs, losses) = columns(out, "step", "lr", "loss")
    (expected_steps, expected_lrs, expected_losses) = columns(expected, "step", "lr", "loss")
    assert steps == expected_steps == list(range(1, 23))
    assert lrs == expected_lrs
    assert losses == pytest.approx(expected_losses, rel=2e-5)
    mine, theirs = checkpoint.load(out / "model.pt"), checkpoint.load(expected / "model.pt")
    assert mine["arguments"] == theirs["arguments"]
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    for name, value in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], value, rtol=1e-3, atol=1e-4, msg=name)
