"""The parts of a run: images, network, optimiser, schedule, averaged weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from smlp import data
from smlp.checkpoint import CheckpointError, load_checkpoint
from smlp.network import PyramidNetwork
from smlp.train import parallel
from smlp.train.config import BUNDLED, TrainConfig
from smlp.train.image_folder import ImageFolderSource
from smlp.train.loaders import InMemory, Source
from smlp.train.models import Fuse, build_model, model_arguments
from smlp.train.parallel import World

WARMUP_START = 1e-3  # of the learning rate
REMEDIES = "a lower --lr, a longer --warmup-epochs or --clip-grad 1 usually helps"


@dataclass(frozen=True)
class Result:
    """Weights on the held-out images.

    Attributes:
        epoch: after how many epochs.
        averaged: whether they are the averaged weights of the run.
        loss: mean cross-entropy.
        accuracy: share classified correctly, 0 to 1.
    """

    epoch: int
    averaged: bool
    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"held-out accuracy {self.accuracy:.2%}, loss {self.loss:.4f}"

    @property
    def weights(self) -> str:
        """Which weights these are, in words."""
        return f"the {'averaged ' if self.averaged else ''}weights after epoch {self.epoch}"

    def rank(self) -> tuple[float, float]:
        """Return a key that sorts the best first: by accuracy, then by loss."""
        return -self.accuracy, self.loss


@dataclass
class Run:
    """A network in training and how far it has come.

    Attributes:
        model: the network, sharded in place when FSDP2 is used.
        forward: what training calls: ``model``, or its DDP wrapper.
        arguments: the keyword arguments that ``model`` was built with.
        optimizer: AdamW.
        scaler: scales the loss, against gradients too small for float16; disabled for other types.
        ema: exponential moving average of the weights, with the buffers of ``model``; or None.
        steps_per_epoch: optimiser steps of one pass over the images.
        step: optimiser steps done.
        loss_sum: sum of the losses of the current epoch so far.
        kept: what ``model.pt`` holds; None before the first epoch.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    arguments: dict[str, Any]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None
    steps_per_epoch: int
    step: int = 0
    loss_sum: float = 0.0
    kept: Result | None = None


def open_source(config: TrainConfig, world: World) -> Source:
    """Open the data of ``config``.

    Raises:
        ValueError: if there is no such data, or the batch does not divide or exceeds it.
        ImportError: if a package is missing, with the command that installs it.
        OSError: if a folder cannot be read.
    """
    if config.batch_size % world.size:
        raise ValueError(
            f"batch_size: expected a multiple of the {world.size} processes, "
            f"got {config.batch_size}"
        )
    if config.accumulate > config.batch_size // world.size:
        raise ValueError(
            f"accumulate: expected at most the {config.batch_size // world.size} images of a step "
            f"and process, got {config.accumulate}"
        )
    source: Source
    if config.data in BUNDLED:
        source = InMemory(getattr(data, config.data)(), config, world)
    else:
        source = ImageFolderSource(config, world)
    if config.batch_size > len(source.train_labels):
        raise ValueError(
            f"batch_size: expected at most the {len(source.train_labels)} training images, "
            f"got {config.batch_size}"
        )
    return source


def build(config: TrainConfig, source: Source, world: World, fuse: Fuse | None = None) -> Run:
    """Build the network and what trains it, with the same weights on every process.

    Raises:
        ValueError: if sizes do not divide, ``config.init`` does not fit, or an option needs another
            device or a larger batch.
        OSError: if ``config.init`` cannot be read.
    """
    if config.sync_bn and world.device.type != "cuda":
        raise ValueError(
            f"sync_bn: expected a CUDA device, got {world.device.type}; "
            "torch's SyncBatchNorm needs one, --freeze-bn does not"
        )
    sharded = world.size > 1 and config.parallel == "fsdp"
    arguments = model_arguments(config, source.image_size, source.in_channels, len(source.classes))
    torch.manual_seed(config.seed)
    network = build_model(config.model, arguments, fuse).to(world.device)
    _check_batch_norm(network, config, world)
    if config.init is not None:
        _start_from(network, config.init)
    network.set_grad_checkpointing(config.grad_checkpointing)
    model: nn.Module = network
    if config.channels_last and not sharded:  # FSDP2 shards contiguous parameters only
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    ema = AveragedModel(model) if config.ema_decay else None
    if sharded:  # after the copy above: a sharded module cannot be copied
        parallel.shard(model, world)
        if ema is not None:
            parallel.shard(ema.module, world)
    if config.compile:
        model.compile()
    forward = parallel.replicate(model, world) if world.size > 1 and not sharded else model
    # From here on each process draws its own random numbers: dropout differs between processes.
    torch.manual_seed((config.seed * 1_000_003 + world.rank) % 2**63)
    return Run(
        model,
        forward,
        arguments,
        build_optimizer(model, config),
        torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16"),
        ema,
        steps_per_epoch=len(source.train_labels) // config.batch_size,
    )


def _check_batch_norm(network: PyramidNetwork, config: TrainConfig, world: World) -> None:
    """Refuse a batch of which BatchNorm would see a single value per channel."""
    height, width = network.sizes[-1]
    images = config.batch_size // world.size // config.accumulate
    together = config.sync_bn and world.size > 1
    if images * height * width == 1 and not (config.freeze_bn or together):
        raise ValueError(
            "batch_size: expected at least 2 images per process and part of a step, since the last "
            "feature maps are 1 x 1 and BatchNorm needs two values, "
            f"got {config.batch_size} (processes: {world.size}, parts: {config.accumulate}); "
            "with --freeze-bn one is enough"
        )


def _start_from(network: PyramidNetwork, path: str) -> None:
    """Load weights; the classifier only if the file has as many classes."""
    try:
        try:
            load_checkpoint(network, path)
        except CheckpointError as error:
            if not all("head." in problem for problem in error.problems):
                raise
            load_checkpoint(network, path, classifier=False)
    except ValueError as error:
        raise ValueError(str(error).replace("source:", "init:", 1)) from error


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return AdamW with weight decay for matrices and filters, not for biases and norms."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.lr)


def learning_rate(config: TrainConfig, steps_per_epoch: int, step: int) -> float:
    """Return the learning rate of step ``step``, counted from 0: a line up, then a cosine down."""
    total, warmup = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    if warmup >= total:
        warmup = total // 2
    if step < warmup:
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
    turn = math.pi * (step - warmup) / (total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(turn)) / 2


def average_weights(ema: AveragedModel, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards those of ``model`` after a step.

    The decay rises to ``decay`` by the rule of timm's ``ModelEmaV3`` with warm-up, so that a short
    run averages over its recent steps instead of remembering its random start.
    """
    now = min(decay, 1 - (1 + int(ema.n_averaged)) ** (-2 / 3))
    ema.multi_avg_fn = get_ema_multi_avg_fn(now)
    ema.update_parameters(model)
