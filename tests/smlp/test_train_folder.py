"""Training on an image folder in the ImageNet layout, where torchvision can be imported."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smlp.train import TrainConfig, loop, train
from smlp.train.image_folder import MEAN, STD, ImageFolderSource
from smlp.train.models import load_network
from smlp.train.parallel import World

try:
    import torchvision  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)
Image = pytest.importorskip("PIL.Image", reason="needs pillow, of the demo extra's matplotlib")
pytest.importorskip("sklearn", reason="needs the demo extra")
pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of scikit-learn's digits as 16-bit PNG files of 16 x 24 pixels."""
    from sklearn.datasets import load_digits

    root, bunch = tmp_path_factory.mktemp("digits"), load_digits()
    for label in range(3):
        of_label = bunch.images[bunch.target == label]
        for i, pixels in enumerate(of_label[:40]):
            path = root / ("train" if i < 30 else "val") / str(label)
            path.mkdir(parents=True, exist_ok=True)
            grey = np.asarray(Image.fromarray((pixels * 15).astype(np.uint8)).resize((24, 16)))
            Image.fromarray(grey.astype(np.uint16) * 257).save(path / f"{i}.png")  # of 16 bits
    return root


def config(folder: Path, out: Path, **options: Any) -> TrainConfig:
    sizes = {"image_size": (16, 16), "patch_size": 2, "d_model": 8, "depth": (1, 1)}
    course = {"epochs": 3, "batch_size": 18, "workers": 0, "progress": False, "device": "cpu"}
    return TrainConfig(**{"data": str(folder), "out": str(out), **sizes, **course, **options})


EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "randaugment": 9,
    "random_erasing": 0.25,
    "label_smoothing": 0.1,
    "model": "smlpnet_tiny",
}


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_it_learns_and_keeps_its_normalisation(folder: Path, tmp_path: Path) -> None:
    summary = train(config(folder, tmp_path, epochs=8))
    assert summary.held_out.accuracy > 0.6  # of three classes
    trained = load_network(tmp_path / "model.pt")
    assert trained.network.num_classes == 3
    assert (trained.mean, trained.std) == (MEAN, STD)


def test_stopped_and_continued_with_every_augmentation_it_is_the_same_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(folder, tmp_path / "whole", **EVERYTHING))
    cut = config(folder, tmp_path / "cut", checkpoint_every=3, workers=2, **EVERYTHING)
    taken, step = 0, loop._step

    def interrupted_step(*arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 9:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    moved = shutil.copytree(folder, tmp_path / "moved")
    train(replace(cut, resume=True, data=str(moved)))
    assert len(losses(tmp_path / "cut")) == 15
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_held_out_images_are_centre_crops(folder: Path, tmp_path: Path) -> None:
    source = ImageFolderSource(config(folder, tmp_path, image_size=(14, 14)), ALONE)
    images, labels = next(source.test_batches())
    first = min((folder / "val" / "0").iterdir(), key=str)
    with Image.open(first) as file:
        grey = np.asarray(file, dtype=np.float32) / (
            2**16 - 1
        )  # 24 x 16: at 16 rows nothing is resized
    pixels = torch.from_numpy(grey)[1:15, 5:19, None].expand(-1, -1, 3)
    expected = ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    assert labels[0] == 0
    torch.testing.assert_close(images[0], expected, atol=1e-5, rtol=1e-5)


def test_mixed_labels_are_shares_that_sum_to_one(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixed = ImageFolderSource(config(folder, tmp_path, mixup=0.8), ALONE)
    _, labels = next(mixed.train_batches(0, 0))
    assert labels.shape == (18, 3)
    torch.testing.assert_close(labels.sum(1), torch.ones(18))
    assert ((labels > 0).sum(1) == 2).any()
    plain = ImageFolderSource(config(folder, tmp_path), ALONE)
    assert next(plain.train_batches(0, 0))[1].shape == (18,)


def test_parts_with_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a", "val/c"):
        path = tmp_path / name
        path.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path / "0.png")
    with pytest.raises(ValueError, match=r"data: expected the same classes .* got 2 .*: b, c"):
        ImageFolderSource(config(tmp_path, tmp_path), ALONE)
