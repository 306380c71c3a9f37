"""Held-out images: loss and accuracy of a network, and of a run with its averaged weights."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from smlp.train import parallel
from smlp.train.config import TrainConfig
from smlp.train.loaders import Source
from smlp.train.parallel import World
from smlp.train.run import Run


@dataclass(frozen=True)
class Outcome:
    """Results on the held-out images.

    Attributes:
        loss: mean cross-entropy.
        accuracy: share classified correctly, 0 to 1.
        ema_accuracy: the same with the averaged weights; None without them.
    """

    loss: float
    accuracy: float
    ema_accuracy: float | None

    def __str__(self) -> str:
        averaged = ""
        if self.ema_accuracy is not None:
            averaged = f" ({self.ema_accuracy:.2%} with averaged weights)"
        return f"held-out accuracy {self.accuracy:.2%}{averaged}, loss {self.loss:.4f}"


def evaluate_run(run: Run, source: Source, config: TrainConfig, world: World) -> Outcome:
    """Evaluate the network of ``run`` and its average; all processes have to call this."""
    loss, accuracy = evaluate(run.model, source, config, world)
    averaged = evaluate(run.ema.module, source, config, world)[1] if run.ema else None
    return Outcome(loss, accuracy, averaged)


@torch.no_grad()
def evaluate(
    model: nn.Module, source: Source, config: TrainConfig, world: World
) -> tuple[float, float]:
    """Return mean cross-entropy and accuracy of ``model`` on the held-out images.

    Args:
        model: the network, plain or sharded; its mode is restored afterwards.
        source: the images.
        config: autocast and memory format.
        world: the processes that share the images; all of them have to call this.
    """
    parallel.average_buffers(model, world)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=world.device)
    for images, labels in source.test_batches():
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            logits = model(images)
        totals[0] += cross_entropy(logits.float(), labels, reduction="sum")
        totals[1] += (logits.argmax(dim=1) == labels).sum()
    for module, training in modes:
        module.training = training
    loss, correct = world.sum(totals).tolist()
    return loss / source.test_count, correct / source.test_count
