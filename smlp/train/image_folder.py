"""A folder of images by class: listed, read by pillow, augmented by torchvision."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from smlp.images import EXTENSIONS, Preprocessing, image_files, read_image, to_tensor
from smlp.train.config import BUNDLED, TrainConfig
from smlp.train.loaders import Batch, epoch_shares, held_out_shares
from smlp.train.parallel import World

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as everywhere
CROP = 0.875  # share of a held-out image's sides that its centre crop is cut from, as everywhere


class ImagesByClass(Dataset[Any]):
    """The images of ``<root>/<class>/**`` with their labels; hidden files and folders do not count.

    Args:
        root: the folder; its folders are the classes, in the order of their names.
        prepare: makes a tensor from the path of an image.
        classes: the names of the classes, in the order of their labels; by default all folders.

    Attributes:
        classes: the names of the classes, by label.
        labels: the label of each image.

    Raises:
        ValueError: if there are no classes or one that is not in ``classes``, or one is empty.
        OSError: if a folder cannot be read.
    """

    def __init__(
        self,
        root: Path,
        prepare: Callable[[Path], Tensor],
        classes: Sequence[str] | None = None,
    ) -> None:
        found = sorted(
            path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        self.classes = found if classes is None else list(classes)
        if not found:
            raise ValueError(f"data: expected a folder for each class in {root}, got none")
        unknown = [name for name in found if name not in self.classes]
        if unknown:
            raise ValueError(
                f"data: expected classes among the {len(self.classes)} known ones in {root}, "
                f"got {len(unknown)} others: {', '.join(unknown[:5])}"
            )
        self.labels: list[int] = []
        self._paths: list[Path] = []
        for name in found:
            paths = image_files(root / name)
            if not paths:
                raise ValueError(
                    f"data: expected images ({', '.join(EXTENSIONS)}) in {root / name}, got none"
                )
            self._paths += paths
            self.labels += [self.classes.index(name)] * len(paths)
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        """Return the image as a tensor and its label; or the error, where it cannot be read."""
        try:
            return self._prepare(self._paths[index]), self.labels[index]
        except ValueError as error:  # raised in a worker, it would come with the worker's traceback
            return error


def batches(
    dataset: "Dataset[Any]", shares: Iterable[list[int]], workers: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the images and labels of each share of indices, on ``device``.

    Raises:
        ValueError: if an image cannot be read.
    """
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=shares,
        num_workers=workers,
        pin_memory=on_gpu,
        collate_fn=_collate,
        worker_init_fn=_leave_the_process_group,
        # Without its own generator the loader draws from the global one, whose state a run that
        # continues in the middle of an epoch has to find untouched.
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        images, labels = batch
        yield images.to(device, non_blocking=on_gpu), labels.to(device, non_blocking=on_gpu)


def _collate(samples: list[Any]) -> Any:
    errors = [sample for sample in samples if isinstance(sample, ValueError)]
    return errors[0] if errors else default_collate(samples)


def _leave_the_process_group(worker: int) -> None:
    """Let Ctrl-C reach the main process alone, which needs its workers to finish a step."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class ImageFolderSource:
    """Training images in ``<data>/train/<class>/*``, held-out ones in ``<data>/val/<class>/*``.

    Training images get a random resized crop, a flip, then RandAugment and erasing where asked for;
    every draw depends only on the seed, the epoch and the image, never on the number of workers or
    processes. Mixup and cutmix act on the batch of a process. Held-out images are read by
    :class:`smlp.images.Preprocessing`.

    Args:
        config: the folder, the augmentations, seed and batch size.
        world: the processes that share the images.

    Raises:
        ValueError: if the folder does not have the layout, or its two parts differ in classes.
        ImportError: if torchvision cannot be imported, with the command that installs it.
        OSError: if a folder cannot be read.
    """

    in_channels = 3

    def __init__(self, config: TrainConfig, world: World) -> None:
        root = Path(config.data)
        if not ((root / "train").is_dir() and (root / "val").is_dir()):
            raise ValueError(
                f"data: expected {', '.join(BUNDLED)} or a folder holding train/ and val/, "
                f"got {config.data!r}"
            )
        v2 = _torchvision()
        self.mean, self.std, self.crop = MEAN, STD, CROP
        self.image_size = (224, 224) if config.image_size is None else config.image_size
        self._config, self._world = config, world
        augment = _augmentation(v2, config, self.image_size)
        self._train = ImagesByClass(root / "train", partial(_augmented, augment=augment))
        prepare = Preprocessing(self.in_channels, self.image_size, MEAN, STD, CROP)
        self._test = ImagesByClass(root / "val", prepare)
        if self._train.classes != self._test.classes:
            odd = sorted(set(self._train.classes) ^ set(self._test.classes))
            raise ValueError(
                f"data: expected the same classes in train/ and val/ of {config.data!r}, "
                f"got {len(odd)} in one alone: {', '.join(odd[:5])}"
            )
        self.classes = self._train.classes
        self.train_labels, self.test_labels = self._train.labels, self._test.labels
        self._mix = _mixing(v2, config, len(self.classes))

    def train_batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """See :class:`smlp.train.loaders.Source`."""
        config = self._config
        count = len(self.train_labels)
        shares = epoch_shares(count, config.batch_size, config.seed, epoch, self._world, first_step)
        seeded = Seeded(self._train, config.seed, epoch)
        for images, labels in batches(seeded, list(shares), config.workers, self._world.device):
            yield self._mix(images, labels) if self._mix else (images, labels)

    def test_batches(self) -> Iterator[Batch]:
        """See :class:`smlp.train.loaders.Source`."""
        config, device = self._config, self._world.device
        shares = list(held_out_shares(len(self.test_labels), config.batch_size, self._world))
        yield from batches(self._test, [s for s in shares if s], config.workers, device)
        for _ in range(sum(not share for share in shares)):
            images = torch.empty(0, self.in_channels, *self.image_size, device=device)
            yield images, torch.empty(0, dtype=torch.int64, device=device)


class Seeded(Dataset[Any]):
    """A dataset whose random transforms draw from their own seed for each image and epoch.

    Args:
        dataset: what to wrap.
        seed: seed of the run.
        epoch: which pass over the images.
    """

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.seed * 1_000_003 + self.epoch) * 16_777_619 + index) % 2**63)
            return self.dataset[index]


def _augmented(path: Path, augment: Callable[[Any], Tensor]) -> Tensor:
    return augment(read_image(path, ImageFolderSource.in_channels))


def _torchvision() -> Any:
    try:
        from torchvision.transforms import v2  # type: ignore[import-not-found,unused-ignore]
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ImportError(
            "data: training on an image folder needs a torchvision that fits the installed torch "
            f"{torch.__version__}: pip install torchvision (importing it failed: {error})"
        ) from error
    return v2


def _augmentation(v2: Any, config: TrainConfig, image_size: tuple[int, int]) -> Any:
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [
        v2.RandomResizedCrop(image_size, interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if config.randaugment:
        steps.append(v2.RandAugment(magnitude=config.randaugment, interpolation=bicubic))
    steps += [to_tensor, v2.Normalize(MEAN, STD)]
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing))
    return v2.Compose(steps)


def _mixing(
    v2: Any, config: TrainConfig, num_classes: int
) -> Callable[[Tensor, Tensor], Batch] | None:
    """Return mixup, cutmix, or one of the two at random for each batch, as asked for."""
    ways = []
    if config.mixup:
        ways.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        ways.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    if not ways:
        return None
    return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)
