"""The moving parts of a run: network, optimiser, schedule, averaged weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from smlp.train import parallel
from smlp.train.config import TrainConfig
from smlp.train.loaders import Source
from smlp.train.models import build_model, model_arguments
from smlp.train.parallel import World

WARMUP_START = 1e-3  # of the learning rate


@dataclass
class Run:
    """A network in training and how far it has come.

    Attributes:
        model: the network, sharded in place when FSDP2 is used.
        forward: what training calls: ``model``, or its DDP wrapper.
        arguments: the keyword arguments that ``model`` was built with.
        optimizer: AdamW.
        scheduler: stepped after every optimiser step.
        ema: exponential moving average of the weights, with the buffers of ``model``; or None.
        steps_per_epoch: optimiser steps of one pass over the images.
        step: optimiser steps done.
        loss_sum: sum of the losses of the current epoch so far.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    arguments: dict[str, Any]
    optimizer: Optimizer
    scheduler: LRScheduler
    ema: AveragedModel | None
    steps_per_epoch: int
    step: int = 0
    loss_sum: float = 0.0


def build(config: TrainConfig, source: Source, world: World) -> Run:
    """Build the network and what trains it, the same weights on every process.

    Raises:
        ValueError: if sizes do not divide, or an option needs another device.
        ImportError: if the fused blocks cannot be imported.
    """
    if config.sync_bn and world.device.type != "cuda":
        raise ValueError(
            f"sync_bn: expected a CUDA device, got {world.device.type}; "
            "torch's SyncBatchNorm runs nowhere else, --freeze-bn does"
        )
    sharded = world.size > 1 and config.parallel == "fsdp"
    arguments = model_arguments(config, source.image_size, source.in_channels, source.num_classes)
    torch.manual_seed(config.seed)
    model = build_model(config.model, arguments, fused=config.fused).to(world.device)
    if config.channels_last and not sharded:  # FSDP2 shards contiguous parameters only
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    ema = None
    if config.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    if sharded:  # after the copy above: a sharded module cannot be copied
        parallel.shard(model, world)
        if ema is not None:
            parallel.shard(ema.module, world)
    optimizer = build_optimizer(model, config)
    steps_per_epoch = source.train_count // config.batch_size
    scheduler = build_schedule(optimizer, config, steps_per_epoch)
    if config.compile:
        model.compile()
    forward = parallel.replicate(model, world) if world.size > 1 and not sharded else model
    # From here on each process draws its own numbers: its dropout is not its neighbour's.
    torch.manual_seed(config.seed * 1_000_003 + world.rank)
    return Run(model, forward, arguments, optimizer, scheduler, ema, steps_per_epoch)


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return AdamW that decays matrices and filters, but no biases and no normalisations."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.lr)


def build_schedule(optimizer: Optimizer, config: TrainConfig, steps_per_epoch: int) -> LRScheduler:
    """Return a linear warm-up to ``config.lr``, then a cosine down to ``config.min_lr``."""
    warmup = config.warmup_epochs * steps_per_epoch
    cosine_steps = config.epochs * steps_per_epoch - warmup
    cosine = CosineAnnealingLR(optimizer, T_max=cosine_steps, eta_min=config.min_lr)
    if not warmup:
        return cosine
    rise = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])
