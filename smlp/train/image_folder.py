"""An image folder in the ImageNet layout, read by torchvision (extra ``imagenet``)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smlp.train.config import BUNDLED, TrainConfig
from smlp.train.loaders import Batch, epoch_shares, held_out_shares
from smlp.train.parallel import World

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as everywhere
CROP_SHARE = 0.875  # of the shorter side that the centre crop of a held-out image keeps


class ImageFolderSource:
    """``<data>/train/<class>/*`` to learn from and ``<data>/val/<class>/*`` held out.

    Training images get a random resized crop, a flip, then RandAugment and erasing where asked for;
    every draw depends on the seed, the epoch and the image alone, never on the number of workers or
    processes. Mixup and cutmix act on the batch of a process.

    Args:
        config: the folder, the augmentations, seed and batch size.
        world: the processes that share the images.

    Raises:
        ValueError: if the folder does not have the layout, or its two parts differ in classes.
        ImportError: if torchvision cannot be imported, with the command that installs it.
    """

    in_channels = 3

    def __init__(self, config: TrainConfig, world: World) -> None:
        root = Path(config.data)
        if not ((root / "train").is_dir() and (root / "val").is_dir()):
            raise ValueError(
                f"data: expected {', '.join(BUNDLED)} or a folder holding train/ and val/, "
                f"got {config.data!r}"
            )
        datasets, transforms = _torchvision()
        self.mean, self.std = MEAN, STD
        self.image_size = config.image_size or (224, 224)
        self._config, self._world = config, world
        train = datasets.ImageFolder(root / "train", _augmentation(transforms, config, self))
        test = datasets.ImageFolder(root / "val", _centre_crop(transforms, self.image_size))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"data: expected the same classes in train/ and val/ of {config.data!r}, "
                f"got {len(odd)} in one alone: {', '.join(odd[:5])}"
            )
        self.num_classes = len(train.classes)
        self.train_count, self.test_count = len(train), len(test)
        self._train, self._test = train, test
        self._mix = _mixing(transforms, config, self.num_classes)

    def train_batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """See :class:`smlp.train.loaders.Source`."""
        config = self._config
        shares = epoch_shares(
            self.train_count, config.batch_size, config.seed, epoch, self._world, first_step
        )
        for images, labels in self._load(Seeded(self._train, config.seed, epoch), list(shares)):
            yield self._mix(images, labels) if self._mix else (images, labels)

    def test_batches(self) -> Iterator[Batch]:
        """See :class:`smlp.train.loaders.Source`."""
        shares = list(held_out_shares(self.test_count, self._config.batch_size, self._world))
        yield from self._load(self._test, [share for share in shares if share])
        for _ in range(sum(not share for share in shares)):
            images = torch.empty(0, self.in_channels, *self.image_size, device=self._world.device)
            yield images, torch.empty(0, dtype=torch.int64, device=self._world.device)

    def _load(self, dataset: "Dataset[Any]", shares: list[list[int]]) -> Iterator[Batch]:
        on_gpu = self._world.device.type == "cuda"
        loader = DataLoader(
            dataset,
            batch_sampler=shares,
            num_workers=self._config.workers,
            pin_memory=on_gpu,
            # Without its own generator the loader draws from the global one, whose state a run that
            # goes on in the middle of an epoch has to find untouched.
            generator=torch.Generator().manual_seed(0),
        )
        for images, labels in loader:
            yield (
                images.to(self._world.device, non_blocking=on_gpu),
                labels.to(self._world.device, non_blocking=on_gpu),
            )


class Seeded(Dataset[Any]):
    """A dataset whose random transforms draw from a seed of their own for each image and epoch.

    Args:
        dataset: what to wrap.
        seed: of the run.
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


def _torchvision() -> tuple[Any, Any]:
    try:
        from torchvision import datasets  # type: ignore[import-not-found,unused-ignore]
        from torchvision.transforms import v2  # type: ignore[import-not-found,unused-ignore]
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ImportError(
            "data: an image folder needs a torchvision that fits the installed torch "
            f"{torch.__version__}: pip install torchvision (importing it failed: {error})"
        ) from error
    return datasets, v2


def _augmentation(v2: Any, config: TrainConfig, source: ImageFolderSource) -> Any:
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [
        v2.RandomResizedCrop(source.image_size, interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if config.randaugment:
        steps.append(v2.RandAugment(magnitude=config.randaugment, interpolation=bicubic))
    steps += _to_tensor(v2)
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing))
    return v2.Compose(steps)


def _centre_crop(v2: Any, image_size: tuple[int, int]) -> Any:
    resized = [round(side / CROP_SHARE) for side in image_size]
    # One number keeps the aspect ratio of the image; a rectangle has to be given as such.
    target = resized[0] if image_size[0] == image_size[1] else resized
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose(
        [
            v2.Resize(target, interpolation=bicubic, antialias=True),
            v2.CenterCrop(image_size),
            *_to_tensor(v2),
        ]
    )


def _to_tensor(v2: Any) -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


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
