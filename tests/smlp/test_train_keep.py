"""Which weights a run keeps: evaluated, the best, and said to be these."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smlp.cli import main
from smlp.train import checkpoint, loop
from smlp.train.models import load_network
from smlp.train.run import Result
from tests.smlp.train_runs import TINY

pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_averaged_weights_of_a_short_run_are_of_use(tmp_path: Path) -> None:
    options = "--data digits --epochs 2 --ema-decay 0.9999 --device cpu --out"
    assert main(["train", *options.split(), str(tmp_path)]) == 0
    last = (tmp_path / "epochs.csv").read_text().splitlines()[-1].split(",")
    accuracy, ema_accuracy = float(last[4]), float(last[6])
    assert ema_accuracy > accuracy - 0.1 and accuracy > 0.8  # 0.086 without a warm-up
    kept = checkpoint.load(tmp_path / "model.pt")["result"]
    assert kept["accuracy"] == max(accuracy, ema_accuracy)


@pytest.mark.parametrize(
    ("keep", "expected"), [("best", (1, True)), ("last", (2, True)), ("raw", (1, False))]
)
def test_model_pt_holds_what_the_summary_says(
    keep: str,
    expected: tuple[int, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    best = 0.4 if keep == "raw" else 0.6
    scores = {(1, False): 0.5, (1, True): best, (2, False): 0.3, (2, True): 0.5}
    weights = {}

    def evaluate_run(run: Any, *_: object) -> list[Result]:
        epoch = run.step // run.steps_per_epoch
        for averaged, model in enumerate((run.model, run.ema.module)):
            weights[epoch, bool(averaged)] = {k: v.clone() for k, v in model.state_dict().items()}
        return [Result(epoch, kind, 1.0, scores[epoch, kind]) for kind in (False, True)]

    monkeypatch.setattr(loop, "evaluate_run", evaluate_run)
    option = "last" if keep == "last" else "best"
    command = ["train", *TINY.split(), "--ema-decay", "0.9", "--out", str(tmp_path)]
    assert main([*command, "--epochs", "1", "--keep", option]) == 0
    assert main(["train", "--resume", "--epochs", "2", "--out", str(tmp_path)]) == 0
    network = load_network(tmp_path / "model.pt").network
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[expected][name]), name
    which = f"{'averaged ' if expected[1] else ''}weights after epoch {expected[0]}"
    assert capsys.readouterr().out.endswith(
        f"held-out accuracy {scores[expected]:.2%}, loss 1.0000, after 10 steps\n"
        f"{tmp_path}/model.pt holds the {which}\n"
    )


def test_equal_accuracies_are_told_apart_by_their_losses() -> None:
    results = [
        Result(1, False, loss, share) for loss, share in ((0.5, 0.9), (0.4, 0.9), (0.1, 0.8))
    ]
    assert min(results, key=Result.rank).loss == 0.4
