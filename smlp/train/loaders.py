"""Batches of a training run: which images each process gets at which step, and from where.

The order of an epoch depends only on the seed and the epoch, and is dealt out by global batch: with
any number of processes, step k sees the same images. So a run is repeatable, can continue in the
middle of an epoch, and computes with several processes what it would with one.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from smlp.data import ImageSplit
from smlp.train.config import TrainConfig
from smlp.train.parallel import World

Batch = tuple[Tensor, Tensor]
"""Images ``[B, C, H, W]`` and labels: ``[B]``, or ``[B, classes]`` after mixup or cutmix."""


class Source(Protocol):
    """A source of batches, which are on the device of the process."""

    image_size: tuple[int, int]
    in_channels: int
    classes: list[str]
    """Their names, by label."""
    train_labels: list[int]
    """Of the training images."""
    test_labels: list[int]
    """Of the held-out images."""
    mean: list[float]
    """What was subtracted from each colour channel, on a scale from 0 to 1."""
    std: list[float]
    """What each channel was divided by after that."""
    crop: float
    """Share of a held-out image file's height and width that its centre was cut from."""

    def train_batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Yield this process's share of every global batch of ``epoch`` from ``first_step`` on."""

    def test_batches(self) -> Iterator[Batch]:
        """Yield this process's share of the held-out images; the last batches may be empty."""


def counts(source: Source) -> dict[str, Any]:
    """Return what identifies a set of images: shape, classes, and how many images each has."""

    def by_class(labels: list[int]) -> list[int]:
        counter = Counter(labels)
        return [counter[label] for label in range(len(source.classes))]

    return {
        "classes": list(source.classes),
        "train": by_class(source.train_labels),
        "held out": by_class(source.test_labels),
        "shape": [source.in_channels, *source.image_size],
    }


def epoch_shares(
    count: int, batch_size: int, seed: int, epoch: int, world: World, first_step: int = 0
) -> Iterator[list[int]]:
    """Yield the indices that one process trains on, step by step.

    Args:
        count: number of training images; those left over after the last full batch are skipped in
            this epoch.
        batch_size: images per step over all processes, a multiple of their number.
        seed: of the order.
        epoch: which pass over the images.
        world: whose share.
        first_step: how many steps of the epoch are already done.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    share = batch_size // world.size
    for step in range(first_step, count // batch_size):
        begin = step * batch_size + world.rank * share
        yield order[begin : begin + share].tolist()


def held_out_shares(count: int, batch_size: int, world: World) -> Iterator[list[int]]:
    """Yield the held-out indices of one process, the same number of steps on each."""
    for begin in range(0, count, batch_size):
        yield list(range(begin + world.rank, min(begin + batch_size, count), world.size))


class InMemory:
    """A bundled image set, kept on the device as a whole.

    Args:
        split: the images.
        config: seed and batch size.
        world: the processes that share them.
    """

    def __init__(self, split: ImageSplit, config: TrainConfig, world: World) -> None:
        self.image_size = split.image_size
        self.in_channels = split.in_channels
        self.classes = [str(label) for label in range(split.num_classes)]
        self.mean, self.std, self.crop = [split.mean], [split.std], 1.0
        self.train_labels = split.train_labels.tolist()
        self.test_labels = split.test_labels.tolist()
        self._config, self._world = config, world
        self._train = split.train_images.to(world.device), split.train_labels.to(world.device)
        self._test = split.test_images.to(world.device), split.test_labels.to(world.device)

    def train_batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """See :class:`Source`."""
        config, count = self._config, len(self.train_labels)
        shares = epoch_shares(count, config.batch_size, config.seed, epoch, self._world, first_step)
        images, labels = self._train
        for share in shares:
            yield images[share], labels[share]

    def test_batches(self) -> Iterator[Batch]:
        """See :class:`Source`."""
        images, labels = self._test
        for share in held_out_shares(len(labels), self._config.batch_size, self._world):
            yield images[share], labels[share]
