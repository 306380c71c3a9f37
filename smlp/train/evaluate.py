"""Held-out images: loss and accuracy of a network, and of a run with its averaged weights."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from smlp import data as bundled
from smlp.train import parallel
from smlp.train.config import BUNDLED, TrainConfig
from smlp.train.image_folder import ImagesByClass
from smlp.train.loaders import Batch, Source
from smlp.train.models import Trained
from smlp.train.parallel import World
from smlp.train.run import REMEDIES, Result, Run


def evaluate_run(run: Run, source: Source, config: TrainConfig, world: World) -> list[Result]:
    """Evaluate the network of ``run`` and its average, if any; all processes have to call this.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    epoch = run.step // run.steps_per_epoch
    results = []
    for averaged, model in enumerate([run.model, *([run.ema.module] if run.ema else [])]):
        loss, accuracy = evaluate(
            model, source.test_batches(), world, amp=config.amp, channels_last=config.channels_last
        )
        result = Result(epoch, bool(averaged), loss, accuracy)
        if not abs(loss) < float("inf"):
            raise FloatingPointError(f"the held-out loss of {result.weights} is {loss}; {REMEDIES}")
        results.append(result)
    return results


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    amp: str = "none",
    channels_last: bool = False,
) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy of ``model`` on held-out images.

    Args:
        model: the network, plain or sharded; its mode is restored afterwards.
        batches: this process's share of the images and labels, on its device.
        world: the processes that share the images; all of them have to call this.
        amp: the autocast, one of :data:`smlp.train.config.AMP`.
        channels_last: whether images get that memory format.
    """
    parallel.average_buffers(model, world)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    for images, labels in batches:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with world.autocast(amp):
            logits = model(images)
        totals[0] += cross_entropy(logits.float(), labels, reduction="sum")
        totals[1] += (logits.argmax(dim=1) == labels).sum()
        totals[2] += len(labels)
    for module, training in modes:
        module.training = training
    loss, correct, count = world.sum(totals).tolist()
    return loss / count, correct / count


def held_out(trained: Trained, data: str) -> ImagesByClass | TensorDataset:
    """Return the images to evaluate a trained network on, ready as its input, and their labels.

    Args:
        trained: the network.
        data: a bundled set, or a folder that has a folder for each class, itself or in ``val/``.
            It need not have all classes.

    Raises:
        ValueError: if there is no such data, or its images or classes do not fit the network.
        ImportError: if a package is missing, with the command that installs it.
        OSError: if a folder cannot be read.
    """
    network = trained.network
    if data in BUNDLED:
        split = getattr(bundled, data)()
        got = split.in_channels, *split.image_size, split.num_classes
        expected = network.in_channels, *network.image_size, len(trained.classes)
        if got != expected:
            numbers = "{} x {} x {} and {} classes".format
            raise ValueError(
                f"data: expected images of {numbers(*expected)}, as the network has them, "
                f"got {data!r} of {numbers(*got)}"
            )
        return TensorDataset(split.test_images, split.test_labels)
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"data: expected {', '.join(BUNDLED)} or a folder, got {data!r}")
    inner = root / "val"
    return ImagesByClass(inner if inner.is_dir() else root, trained.preprocessing, trained.classes)
