"""The training loop: build, go on where a checkpoint left off, train, evaluate, write down."""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smlp.train import parallel, state
from smlp.train.config import TrainConfig
from smlp.train.evaluate import Outcome, evaluate_run
from smlp.train.loaders import Source
from smlp.train.logs import Log, progress
from smlp.train.models import MODEL
from smlp.train.parallel import World
from smlp.train.run import Run, build
from smlp.train.sources import open_source

_logger = logging.getLogger(__name__)

FLUSH_STEPS = 50  # losses stay on the device this long: reading one waits for the device


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        out: the folder with its files.
        steps: optimiser steps over all of the run.
        held_out: the results on the held-out images.
        is_main: whether this process is the one that reports.
    """

    out: Path
    steps: int
    held_out: Outcome
    is_main: bool

    def __str__(self) -> str:
        return f"{self.held_out}, after {self.steps} steps\nweights: {self.out / MODEL}"


def train(config: TrainConfig) -> Summary:
    """Train a network and leave checkpoints and logs in ``config.out``.

    Started by torchrun it runs on all its processes. With ``config.resume`` it goes on from the
    last checkpoint, and with the same number of processes computes to the bit what it would have
    without the interruption.

    Args:
        config: what to train, on what, how.

    Returns:
        The outcome on the held-out images.

    Raises:
        ValueError: if options do not fit together, the data, or the checkpoint.
        ImportError: if an optional package is missing, with the command that installs it.
        FloatingPointError: if the loss stops being a number.
    """
    with parallel.world_of(config.device) as world:
        out = Path(config.out)
        saved = state.last_checkpoint(out, config)
        source = open_source(config, world)
        run = build(config, source, world)
        if saved is not None:
            state.restore(run, saved, config, world)
        log = None
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
            log = Log(out, run.step)
        world.wait()
        try:
            return _epochs(run, source, config, world, log)
        finally:
            if log is not None:
                log.close()


def _epochs(
    run: Run, source: Source, config: TrainConfig, world: World, log: Log | None
) -> Summary:
    outcome = None
    for epoch in range(run.step // run.steps_per_epoch, config.epochs):
        began = time.perf_counter()
        _train_epoch(run, source, epoch, config, world, log)
        outcome = evaluate_run(run, source, config, world)
        train_loss, run.loss_sum = run.loss_sum / run.steps_per_epoch, 0.0
        if log is not None:
            seconds = round(time.perf_counter() - began, 2)
            row = {"epoch": epoch, "step": run.step, "train_loss": train_loss, "seconds": seconds}
            log.epoch(row | asdict(outcome))
            _logger.info(
                "epoch %d of %d: training loss %.4f, %s",
                *(epoch + 1, config.epochs, train_loss, outcome),
            )
        state.save(run, config, world)
    if outcome is None:  # the checkpoint was of a finished run
        outcome = evaluate_run(run, source, config, world)
    state.save_weights(run, source, config, world)
    return Summary(Path(config.out), run.step, outcome, world.is_main)


def _train_epoch(
    run: Run, source: Source, epoch: int, config: TrainConfig, world: World, log: Log | None
) -> None:
    """Train from wherever in ``epoch`` the run stands to its end."""
    run.model.train()
    if config.freeze_bn:
        for module in run.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    first = run.step % run.steps_per_epoch
    batches = progress(
        source.train_batches(epoch, first),
        total=run.steps_per_epoch - first,
        title=f"epoch {epoch + 1} of {config.epochs}",
        show=config.progress and world.is_main,
    )
    pending: list[tuple[float, Tensor]] = []
    for images, labels in batches:
        lr = float(run.scheduler.get_last_lr()[0])
        pending.append((lr, _step(run, images, labels, config, world)))
        run.step += 1
        in_epoch = run.step % run.steps_per_epoch
        due = config.checkpoint_every and run.step % config.checkpoint_every == 0
        if len(pending) == FLUSH_STEPS or in_epoch == 0 or due:
            _flush(run, pending, epoch, world, log)
        if due and in_epoch:  # the end of an epoch has its own checkpoint, after the evaluation
            state.save(run, config, world)


def _step(run: Run, images: Tensor, labels: Tensor, config: TrainConfig, world: World) -> Tensor:
    """Take one optimiser step and return this process's loss, still on the device."""
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
        logits = run.forward(images)
    loss = cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if config.clip_grad:
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.optimizer.step()
    run.scheduler.step()
    if run.ema is not None:
        run.ema.update_parameters(run.model)
    return loss.detach()


def _flush(
    run: Run, pending: list[tuple[float, Tensor]], epoch: int, world: World, log: Log | None
) -> None:
    """Average the waiting losses over the processes, check them and write them down."""
    losses = world.mean(torch.stack([loss for _, loss in pending])).tolist()
    first = run.step - len(pending) + 1
    rows = [
        {"step": first + i, "epoch": epoch, "lr": lr, "loss": loss}
        for i, ((lr, _), loss) in enumerate(zip(pending, losses, strict=True))
    ]
    pending.clear()
    run.loss_sum += sum(losses)
    if log is not None:
        log.steps(rows)
    for row in rows:
        if not abs(row["loss"]) < float("inf"):
            raise FloatingPointError(
                f"the loss became {row['loss']} at step {row['step']} (lr {row['lr']:.2e}); "
                "a lower --lr, a longer --warmup-epochs or --clip-grad 1 usually helps"
            )
