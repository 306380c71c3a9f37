"""The model of the demo and its training: the same code for reference and fused blocks."""

import contextlib
import gc
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smlp import SparseMLP
from smlp.data import ImageSplit
from smlp_kernels.surgery import fuse_model

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Settings:
    """What decides a training, besides device and data.

    Attributes:
        epochs: passes over the training images.
        seed: of the initial weights, the order of the images and their shifts.
        d_model: channels of the first stage; the second has twice as many.
        depth: layers, and so sMLP blocks, of each stage.
        batch_size: images a step.
        learning_rate: AdamW's, at the peak of the one-cycle schedule.
        weight_decay: AdamW's.
        label_smoothing: of the cross entropy.
        max_shift: pixels by which training images are moved at most, each way.
    """

    epochs: int = 10
    seed: int = 0
    d_model: int = 32
    depth: tuple[int, int] = (2, 2)
    batch_size: int = 100
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    max_shift: int = 2


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        model: trained, in eval mode.
        losses: ``[steps]``, float32, on the CPU.
        steps_per_epoch: how many of them make an epoch.
        accuracy: share of the held-out images that are classified right.
        seconds: wall time of the training steps.
        peak_bytes: GPU memory allocated at the most during training, less what was allocated
            before; None without a GPU.
    """

    model: SparseMLP
    losses: Tensor
    steps_per_epoch: int
    accuracy: float
    seconds: float
    peak_bytes: int | None


def build_model(settings: Settings, device: torch.device) -> SparseMLP:
    """Build the network for MNIST with reference blocks, with the same weights on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SparseMLP(
            image_size=28,
            patch_size=2,
            in_channels=1,
            num_classes=10,
            d_model=settings.d_model,
            depth=settings.depth,
        )
    return model.to(device)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Autocast to ``dtype``; no autocast at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def training_dtype(device: torch.device) -> torch.dtype:
    """Bfloat16, by autocast, on a GPU, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def train(
    split: ImageSplit, settings: Settings, device: torch.device, *, fused: bool, label: str
) -> Run:
    """Train with AdamW and a one-cycle schedule, showing a progress bar.

    Args:
        split: the images.
        settings: what decides the training.
        device: where it runs.
        fused: whether the blocks are swapped for fused ones before the first step.
        label: what the progress bar is called.

    Returns:
        The trained model and what was measured.

    Raises:
        ValueError: if there are fewer training images than one batch.
        FloatingPointError: if a loss is not finite.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    steps_per_epoch = len(split.train_images) // settings.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"batch_size: expected at most the {len(split.train_images)} training images, "
            f"got {settings.batch_size}"
        )
    if device.type == "cuda":
        # Kernels are compiled and libraries loaded on a model of its own, before the clock runs.
        _Trainer(split, settings, device, fused).step(torch.arange(settings.batch_size))
        gc.collect()  # an optimizer and its schedule refer to each other, and hold memory
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = _allocated(device)
    trainer = _Trainer(split, settings, device, fused)
    order = torch.Generator().manual_seed(settings.seed)
    losses = []
    start = time.perf_counter()
    with tqdm(
        total=settings.epochs * steps_per_epoch, desc=label, unit="step", mininterval=1
    ) as bar:
        for _ in range(settings.epochs):
            shuffled = torch.randperm(len(split.train_images), generator=order)
            for batch in shuffled[: steps_per_epoch * settings.batch_size].split(
                settings.batch_size
            ):
                losses.append(trainer.step(batch))
                bar.update()
            epoch_loss = torch.stack(losses[-steps_per_epoch:]).mean().item()
            bar.set_postfix(loss=f"{epoch_loss:.3f}")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    curve = torch.stack(losses).cpu()
    if not bool(curve.isfinite().all()):
        raise FloatingPointError(f"{label}: the loss is not finite")
    accuracy = held_out_accuracy(trainer.model, split, device)
    return Run(trainer.model, curve, steps_per_epoch, accuracy, seconds, peak)


class _Trainer:
    """A model with its images, optimizer and schedule."""

    def __init__(
        self, split: ImageSplit, settings: Settings, device: torch.device, fused: bool
    ) -> None:
        self.settings, self.device = settings, device
        self.model = build_model(settings, device).train()
        if fused:
            fuse_model(self.model)
        self.images, self.labels = split.train_images.to(device), split.train_labels.to(device)
        self.background = float(split.train_images.min())
        self.shifts = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        steps = settings.epochs * (len(self.images) // settings.batch_size)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.learning_rate, total_steps=steps
        )

    def step(self, batch: Tensor) -> Tensor:
        """One optimizer step on the images with the indices ``batch``; returns the loss."""
        batch = batch.to(self.device)
        images = shift(self.images[batch], self.settings.max_shift, self.background, self.shifts)
        with autocast(self.device, training_dtype(self.device)):
            logits = self.model(images)
        loss = F.cross_entropy(
            logits.float(), self.labels[batch], label_smoothing=self.settings.label_smoothing
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def shift(images: Tensor, most: int, background: float, generator: torch.Generator) -> Tensor:
    """Move each image by whole pixels, at random and on its own, along both axes.

    Args:
        images: ``[B, C, H, W]``.
        most: pixels by which an image is moved at most, each way.
        background: what comes in at the border.
        generator: on the CPU, so that a seed moves the images alike on every device.

    Returns:
        ``[B, C, H, W]``.
    """
    batch, _, height, width = images.shape
    offsets = torch.randint(0, 2 * most + 1, (2, batch), generator=generator).to(images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = offsets[1, :, None] + torch.arange(width, device=images.device)  # [B, W]
    padded = F.pad(images, (most,) * 4, value=background).movedim(1, -1)
    image = torch.arange(batch, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


@torch.no_grad()
def logits_of(model: SparseMLP, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Run the model in eval mode on images of its own device; ``[N, classes]`` in float64.

    ``dtype`` is float32 or what to autocast to; a float64 model takes float64 images as they are.
    """
    model.eval()
    with autocast(images.device, dtype):
        return torch.cat([model(part).double() for part in images.split(EVALUATION_BATCH)])


def held_out_accuracy(model: SparseMLP, split: ImageSplit, device: torch.device) -> float:
    """Share of the held-out images that are classified right, in the type of training."""
    logits = logits_of(model, split.test_images.to(device), training_dtype(device))
    return (logits.argmax(1).cpu() == split.test_labels).double().mean().item()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
