"""Trained networks at work: ``smlp evaluate`` and ``smlp predict``, and the folders they read."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from smlp import data
from smlp.cli import main
from smlp.data import digits
from smlp.images import Preprocessing, load_image
from smlp.train import checkpoint, train
from smlp.train.image_folder import CROP, MEAN, STD, ImagesByClass, batches
from smlp.train.models import load_network
from tests.smlp.train_runs import SMALL

pytest.importorskip("sklearn", reason="needs the demo extra")
Image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra's matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a short run, the classes named."""
    out = tmp_path_factory.mktemp("run")
    train(replace(SMALL, out=str(out), model="sparse_mlp", epochs=2, ema_decay=0.0))
    content = checkpoint.load(out / "model.pt")
    checkpoint.save(out / "model.pt", content | {"classes": NAMES})
    return out / "model.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some held-out digits as 16-bit files in folders by class; hidden things between them."""
    root, split = tmp_path_factory.mktemp("images"), digits()
    for i in range(60):
        path = root / NAMES[split.test_labels[i]] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = (split.test_images[i, 0] * split.std + split.mean) * (2**16 - 1)
        Image.fromarray(pixels.round().numpy().astype(np.uint16)).save(path)
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".DS_Store").touch()
    (root / "one" / "._00.png").write_bytes(b"not an image")
    (root / "one" / "notes.txt").touch()
    return root


def expected(model: Path, count: int | None) -> tuple[float, float, torch.Tensor]:
    split, network = digits(), load_network(model).network
    with torch.no_grad():
        logits = network(split.test_images[:count])
    labels = split.test_labels[:count]
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return accuracy, cross_entropy(logits, labels).item(), logits


def test_evaluated_on_its_own_data_and_on_a_folder(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for images, count in (("digits", None), (str(folder), 60)):
        options = ["--data", images, "--workers", "0", "--batch-size", "7"] if count else []
        assert main(["evaluate", "--checkpoint", str(model), *options]) == 0
        accuracy, loss, _ = expected(model, count)
        line = capsys.readouterr().out
        found = re.fullmatch(
            rf"accuracy ([\d.]+%), loss ([\d.]+) on {count or 360} held-out images of {images}\n",
            line,
        )
        assert found, line
        assert found[1] == f"{accuracy:.2%}"
        assert float(found[2]) == pytest.approx(loss, abs=0.02 if count else 1e-4)  # 8 bits


def test_a_folder_may_hold_val_and_lack_classes(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "val" / "two").symlink_to(folder / "two")
    command = ["evaluate", "--checkpoint", str(model), "--workers", "0", "--data", str(tmp_path)]
    assert main(command) == 0
    count = (digits().test_labels[:60] == 2).sum().item()
    assert f" on {count} held-out images" in capsys.readouterr().out
    (tmp_path / "val" / "ten").symlink_to(folder / "one")
    assert main(command) == 2
    assert "expected classes among the 10 known ones" in capsys.readouterr().err


def test_predictions_name_the_likeliest_classes(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(folder.glob("*/[0-9]*.png"), key=lambda path: path.name)
    _, _, logits = expected(model, 60)
    some = [str(path) for path in paths[:3]]
    assert main(["predict", "--checkpoint", str(model), "--top", "2", *some]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, path, row in zip(lines, some, logits[:3], strict=True):
        shares, labels = row.softmax(0).topk(2)
        found = re.fullmatch(rf"{path}: (\w+) ([\d.]+)%, (\w+) ([\d.]+)%", line)
        assert found, line
        assert [found[1], found[3]] == [NAMES[label] for label in labels]
        for text, share in zip((found[2], found[4]), shares.tolist(), strict=True):
            assert float(text) == pytest.approx(100 * share, abs=1)
    assert main(["predict", "--checkpoint", str(model), str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 60


def test_a_broken_image_ends_the_evaluation_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / "one" / name)
    broken = tmp_path / "one" / "b.png"
    broken.write_bytes(broken.read_bytes()[:40])
    for workers in ("0", "1"):  # a worker's error, too, without its traceback
        options = ["--data", str(tmp_path), "--workers", workers]
        assert main(["evaluate", "--checkpoint", str(model), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"smlp evaluate: image: expected an image file, got {broken}: ")
        assert error.count("\n") == 1


def test_other_bundled_images_do_not_fit(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = replace(digits(), train_images=torch.zeros(1437, 1, 28, 28))
    monkeypatch.setattr(data, "mnist5k", lambda: larger)
    assert main(["evaluate", "--checkpoint", str(model), "--data", "mnist5k"]) == 2
    assert (
        "data: expected images of 1 x 8 x 8 and 10 classes, as the network has them, "
        "got 'mnist5k' of 1 x 28 x 28 and 10 classes\n"
    ) in capsys.readouterr().err


class Groups(torch.utils.data.Dataset[Any]):
    """As images, the process groups that they are read in."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(os.getpgrp()), index


@pytest.mark.parametrize(("workers", "same"), [(0, True), (1, False)])
def test_ctrl_c_does_not_reach_the_workers(workers: int, same: bool) -> None:
    [(groups, _)] = batches(Groups(), [[0]], workers, torch.device("cpu"))
    assert (groups.item() == os.getpgrp()) == same


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], r"data: expected a folder for each class in .*, got none"),
        ([".hidden/0.png"], r"data: expected a folder for each class in .*, got none"),
        (["a/0.png", "b/"], r"data: expected images \(\.jpg.*\) in .*/b, got none"),
        (["a/0.png", "b/notes.txt"], r"data: expected images \(\.jpg.*\) in .*/b, got none"),
        (["a/0.png", "b/.hidden.png"], r"data: expected images \(\.jpg.*\) in .*/b, got none"),
    ],
)
def test_folders_without_images_are_named(made: list[str], message: str, tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        ImagesByClass(tmp_path, load)


def load(path: Path) -> Any:
    return load_image(path, 3, (14, 14))


def test_held_out_images_are_centre_crops(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cat" / "0.png")
    prepare = Preprocessing(3, (14, 14), MEAN, STD, CROP)
    dataset = ImagesByClass(tmp_path, prepare)
    [(images, labels)] = batches(dataset, [[0]], 0, torch.device("cpu"))
    cut = torch.from_numpy(pixels[1:15, 5:19] / 255).float()  # 14 of 16 rows: nothing is resized
    wanted = ((cut - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    assert labels.tolist() == [0]
    torch.testing.assert_close(images[0], wanted, atol=1e-5, rtol=1e-5)
