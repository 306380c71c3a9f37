"""The command ``smlp``: what its commands write, and how they refuse; see test_evaluate.py, too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smlp.cli import main
from smlp.data import digits
from smlp.train.models import load_network

pytest.importorskip("sklearn", reason="needs the demo extra")
Image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra's matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of ``smlp train`` and, as image.png, a held-out digit."""
    out = tmp_path_factory.mktemp("run")
    options = "--data digits --d-model 8 --depth 1,1 --epochs 2 --no-progress --device cpu --out"
    assert main(["train", *options.split(), str(out)]) == 0
    split = digits()
    pixels = (split.test_images[0, 0] * split.std + split.mean) * 255
    Image.fromarray(pixels.round().byte().numpy()).save(out / "image.png")
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_features_of_a_trained_network(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smlp import cli

    drawn = {}

    def draw(image: torch.Tensor, stages: dict[str, torch.Tensor], **options: object) -> object:
        drawn.update(image=image, stages=stages, **options)
        return draw_feature_maps(image, stages, **options)  # type: ignore[arg-type]

    draw_feature_maps = cli.draw_feature_maps
    monkeypatch.setattr(cli, "draw_feature_maps", draw)
    out = trained / "pictures" / "features.png"
    checkpoint, image = trained / "model.pt", trained / "image.png"
    arguments = ("--checkpoint", checkpoint, "--image", image, "--out", out, "--channels", 3)
    assert run(capsys, "features", *arguments) == (0, f"wrote {out}\n", "")
    with Image.open(out) as picture:
        assert picture.size[0] > 500

    network, held_out = load_network(checkpoint).network, digits().test_images[:1]
    with torch.no_grad():
        expected, logits = network.forward_features(held_out), network(held_out)[0]
    assert [*drawn["stages"]] == ["stage 1\n8 x 8 x 8", "stage 2\n16 x 4 x 4"]
    for shown, stage in zip(drawn["stages"].values(), expected, strict=True):
        # an image file has 255 steps, the data 16
        torch.testing.assert_close(shown, stage[0], atol=0.05, rtol=0.05)
    assert f"class {logits.argmax()}, {logits.softmax(0).max():.0%}" in drawn["title"]

    content = torch.load(checkpoint)
    content["classes"] = [f"digit {label}" for label in range(10)]
    torch.save(content, trained / "named.pt")
    arguments = ("--checkpoint", trained / "named.pt", "--image", image, "--out", out)
    assert run(capsys, "features", *arguments)[0] == 0
    assert f"class digit {logits.argmax()}, " in drawn["title"]


@pytest.mark.parametrize("trained_one", [True, False])
def test_fields_of_some_layers(
    trained: Path, trained_one: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained / ("fields.png" if trained_one else "fields")  # written where it says
    if trained_one:
        options = ["--checkpoint", trained / "model.pt", "--image", trained / "image.png"]
    else:
        sizes = "--image-size 16,8 --patch-size 1 --depth 2 --d-model 4"
        options = ["--model", "sparse_mlp", *sizes.split()]
    assert run(capsys, "fields", *options, "--out", out)[0] == 0  # of the two layers there are
    with Image.open(out) as picture:
        assert picture.size == (int((2 * 2.6 + 0.9) * 150), int(3.3 * 150))


def test_info_of_a_network_by_name_and_of_a_trained_one(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, table, _ = run(capsys, "info", "--batch-size", 2)
    assert code == 0
    assert "| total" in table and "24,123,584" in table and "4,989.45" in table
    code, table, _ = run(capsys, "info", "--ablation", "sum")
    fuse = sum(d * 2 * (80 << s) ** 2 for s, d in enumerate((2, 8, 14, 2)))
    assert code == 0 and f"{24_123_584 - fuse:,}" in table
    code, table, _ = run(capsys, "info", "--checkpoint", trained / "model.pt")
    count = sum(p.numel() for p in load_network(trained / "model.pt").network.parameters())
    assert code == 0 and f"{count:,}" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("info --image-size 30", "smlp info: image_size: expected a height divisible by 32"),
        ("info --checkpoint no.pt", "smlp info: checkpoint: expected a checkpoint of smlp train"),
        (
            "info --checkpoint {run}/model.pt --depth 2",
            "smlp info: checkpoint: expected without a network's options, got depth",
        ),
        (
            "info --checkpoint {run}/model.pt --model smlpnet_tiny",
            "smlp info: checkpoint: expected without a network's options, got model",
        ),
        ("info --image-size 32", "smlp info: batch_size: expected at least 2, since the last"),
        ("fields --depths 99 --image-size 32", "smlp fields: depth: expected 1 to 26 layers"),
        ("features --checkpoint {run}/model.pt --image no", "smlp features: image: expected an im"),
        ("train --epochs 0", "smlp train: epochs: expected at least 1, got 0"),
        ("train --seed 18446744073709551616", "smlp train: seed: expected less than 2**64, got 18"),
        ("train --init no.pt --out {run}/new", "smlp train: no.pt: No such file or directory"),
        ("info --in-channels 0", "smlp info: in_channels: expected at least 1, got 0"),
        ("info --num-classes 0", "smlp info: num_classes: expected at least 1, got 0"),
        ("info --d-model 0", "smlp info: d_model: expected at least 1, got 0"),
        ("info --patch-size 0", "smlp info: patch_size: expected at least 1, got 0"),
        (
            "evaluate --checkpoint {run}/model.pt --data no",
            "smlp evaluate: data: expected digits, ",
        ),
        ("evaluate --checkpoint {run}/model.pt --batch-size 0", "smlp evaluate: batch_size: expec"),
        ("evaluate --checkpoint {run}/model.pt --workers -1", "smlp evaluate: workers: expected a"),
        ("evaluate --checkpoint {run}/model.pt --device tpu", "smlp evaluate: device: expected au"),
        ("predict --checkpoint {run}/model.pt no.png", "smlp predict: image: expected an image f"),
        ("predict --checkpoint {run}/model.pt --top 0 no.png", "smlp predict: top: expected at l"),
        ("predict --checkpoint {run}/model.pt {run}/tb", "smlp predict: images: expected image f"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: str, message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "tb").mkdir(exist_ok=True)  # a folder without images
    code, out, error = run(capsys, *arguments.format(run=trained).split())
    assert (code, out) == (2, "")
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_module_and_command_are_the_same() -> None:
    command = [sys.executable, "-m", "smlp", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(
        f"\n    {name} " in text
        for name in ("train", "evaluate", "predict", "info", "fields", "features", "export")
    )


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(
        rf"smlp (\d[\w.]*|\(not installed\)), torch {re.escape(torch.__version__)}\n",
        capsys.readouterr().out,
    )
