"""How runs end: stopped, out of space, not a number; one line each, and nothing lost."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smlp.cli import main
from smlp.train import checkpoint, loop, state, train
from smlp.train.models import load_network
from smlp.train.stop import Stopped, stop_requests
from tests.smlp.train_runs import SMALL, TINY, losses

pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """SIGINT interrupts, also where it was ignored: by the shell that started the tests with &."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def at_step(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[..., object], after: bool = False
) -> None:
    """Do something before or after a step of the run, counted from 1."""
    step = loop._step

    def acting(run: Any, *arguments: Any) -> Any:
        if run.step + 1 == number and not after:
            act(run)
        outcome = step(run, *arguments)
        if run.step + 1 == number and after:
            act(run)
        return outcome

    monkeypatch.setattr(loop, "_step", acting)


def poison(run: Any) -> None:
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_lets_it_save_and_say_how_to_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = signal.Signals[name]
    train(replace(SMALL, out=str(tmp_path / "whole")))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    out = tmp_path / "stopped"
    options = (
        "--model smlpnet_small --d-model 8 --depth 2,1 --epochs 2 --batch-size 128 --ema-decay 0.9 "
        "--label-smoothing 0.1 --clip-grad 1 --device cpu"
    )
    at_step(monkeypatch, 5, lambda run: os.kill(os.getpid(), number))
    assert main(["train", *options.split(), "--out", str(out)]) == 130
    error = capsys.readouterr().err
    advice = f"smlp train --resume --out {out}"
    assert (
        error
        == f"smlp train: stopped by {name} after step 5 of 22 and saved; to continue: {advice}\n"
    )
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert checkpoint.load(out / "last.pt")["step"] == 5
    monkeypatch.undo()
    assert main(advice.split()[1:]) == 0
    assert (out / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_at_the_end_of_an_epoch_it_stops_after_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 11, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="after step 11 of 22"):
        train(replace(SMALL, out=str(tmp_path)))
    assert len((tmp_path / "epochs.csv").read_text().splitlines()) == 2
    at_step(monkeypatch, 22, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert train(replace(SMALL, out=str(tmp_path), resume=True)).steps == 22  # nothing was left


def test_the_second_signal_acts_as_ever() -> None:
    with stop_requests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests == ["SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert requests == ["SIGTERM"]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("every", [0, 2])
def test_weights_that_stop_being_numbers_in_the_last_step_are_noticed(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(monkeypatch, 10, poison, after=True)
    command = ["train", *TINY.split(), "--out", str(tmp_path), "--checkpoint-every", str(every)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "smlp train: the held-out loss of the weights after epoch 2 is nan; a l"
    )
    assert error.count("\n") == 1
    last = checkpoint.load(tmp_path / "last.pt")
    assert last["step"] == (8 if every else 5)
    assert all(value.isfinite().all() for value in last["model"].values())
    kept = load_network(tmp_path / "model.pt").network
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_a_checkpoint_in_an_epoch_is_never_of_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 6, poison, after=True)
    with pytest.raises(
        FloatingPointError, match=r"weights stopped being finite by step 6, .* older"
    ):
        train(replace(SMALL, out=str(tmp_path), checkpoint_every=3))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    assert main(["train", *TINY.split(), "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("smlp train: ") and str(tmp_path / out) in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_out_of_gpu_memory_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")

    at_step(monkeypatch, 1, fail)
    assert main(["train", *TINY.split(), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "smlp train: CUDA out of memory: a smaller --batch-size, --accumulate, "
        "--grad-checkpointing or --amp need less\n"
    )


def test_a_folder_that_may_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))  # root, who tests, may do all

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["train", *TINY.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"smlp train: {tmp_path / 'out'}: Permission denied\n"


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.partial").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: '.*/last\.pt'"):
        checkpoint.save(tmp_path / "last.pt", {})


@pytest.mark.parametrize("full", ["last.pt", "model.pt", "log.csv", "epochs.csv"])
def test_a_full_disk_costs_nothing_that_was_written(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *TINY.split(), "--keep", "last", "--out", str(tmp_path)]
    assert main([*command, "--epochs", "1"]) == 0
    before = checkpoint.load(tmp_path / "last.pt")
    open_, fsync = Path.open, os.fsync

    class Full:
        """A file that cannot be written to, as of a buffered file: the error names no path."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: object) -> int:
            raise OSError(28, "No space left on device")

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = open_(path, mode, *arguments, **options)
        appends_or_replaces = mode == "a" or path.name.endswith(".pt.partial")
        return Full(file) if appends_or_replaces and full in path.name else file

    monkeypatch.setattr(Path, "open", opened)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path), "--epochs", "2"]) == 2
    assert capsys.readouterr().err == f"smlp train: {tmp_path / full}: No space left on device\n"
    monkeypatch.undo()
    assert os.fsync is fsync and not list(tmp_path.glob(".*"))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == before["step"] == 5
    assert main(["train", "--resume", "--out", str(tmp_path), "--epochs", "2"]) == 0
    assert len(losses(tmp_path)) == 10


def test_a_finished_run_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *TINY.split(), "--out", str(tmp_path)]
    assert main(command) == 0
    weights = (tmp_path / "model.pt").read_bytes()
    for name in ("nothing", "last.pt", "log.csv"):  # what is left counts, too
        (tmp_path / name).unlink(missing_ok=True)
        assert main([*command, "--seed", "1"]) == 2
        assert "or overwrite to replace it" in capsys.readouterr().err
        assert (tmp_path / "model.pt").read_bytes() == weights
    assert main([*command, "--resume"]) == 2
    assert "got only the weights of a run" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--seed", "1"]) == 0
    assert (tmp_path / "model.pt").read_bytes() != weights
    assert len(losses(tmp_path)) == 10


def test_a_run_that_failed_before_its_first_step_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", *TINY.split(), "--out", str(tmp_path)]

    def fail(run: Any) -> None:
        raise ValueError("image: expected an image file")

    at_step(monkeypatch, 1, fail)
    assert main(command) == 2
    monkeypatch.undo()
    assert main(command) == 0


def test_a_run_without_a_checkpoint_yet_starts_again(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,epoch,lr,loss\n1,0,0.1,2.5\n")
    train(replace(SMALL, out=str(tmp_path), epochs=1, resume=True))
    assert len(losses(tmp_path)) == 11


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    # no number that is derived from it may be out of range
    config = replace(SMALL, out=str(tmp_path), epochs=2, batch_size=1437, seed=2**64 - 1)
    assert train(config).steps == 2


def test_one_line_says_what_trains_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "smlp")
    train(replace(SMALL, out=str(tmp_path), epochs=1))
    count = sum(p.numel() for p in load_network(tmp_path / "model.pt").network.parameters())
    assert caplog.messages[0] == (
        f"smlpnet_small with {count:,} parameters on cpu; digits: 1,437 training "
        "and 360 held-out images of 1 x 8 x 8, 10 classes"
    )
    assert [message.partition(":")[0] for message in caplog.messages[1:]] == ["epoch 1 of 1"]


def test_one_image_of_one_pixel_is_too_little_for_batchnorm(tmp_path: Path) -> None:
    pixel = replace(SMALL, out=str(tmp_path), depth=(1, 1, 1, 1), epochs=1, ema_decay=0.0)
    for options in ({"batch_size": 1}, {"batch_size": 2, "accumulate": 2}):
        with pytest.raises(
            ValueError, match=r"batch_size: expected at least 2 images .*--freeze-bn"
        ):
            train(replace(pixel, **options))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert state.last_checkpoint(tmp_path, pixel) is None
