"""The training loop: build, continue where a checkpoint left off, train, evaluate, write down."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smlp.train import parallel, state
from smlp.train.config import TrainConfig
from smlp.train.evaluate import evaluate_run
from smlp.train.loaders import Source
from smlp.train.logs import Log, progress
from smlp.train.models import MODEL, Fuse, installed_fuse
from smlp.train.parallel import World
from smlp.train.run import REMEDIES, Result, Run, average_weights, build, learning_rate, open_source
from smlp.train.stop import Stopped, stop_requests

_logger = logging.getLogger(__name__)

SMALLEST_SCALE = 2.0**-10  # of the float16 loss; the first is 2**16, halved where steps are skipped
FLUSH_STEPS = 50  # losses stay on the device this long: reading one waits for the device


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        out: the folder with its files.
        steps: optimiser steps over all of the run.
        held_out: the results of the weights that were kept, on the held-out images.
        is_main: whether this process is the one that reports.
    """

    out: Path
    steps: int
    held_out: Result
    is_main: bool

    def __str__(self) -> str:
        kept = f"{self.out / MODEL} holds {self.held_out.weights}"
        return f"{self.held_out}, after {self.steps} steps\n{kept}"


def train(config: TrainConfig, *, fuse: Fuse | None = None) -> Summary:
    """Train a network and leave checkpoints and logs in ``config.out``.

    Under torchrun it runs on all its processes. With ``config.resume`` it continues from the last
    checkpoint, and with the same number of processes and epochs computes bit for bit what it would
    have without the interruption. After SIGINT or SIGTERM it finishes a step and saves before it
    stops; several processes check for them every 50 steps.

    Args:
        config: what to train, on what, how.
        fuse: swaps the fused blocks in if ``config.fused``; by default
            ``smlp_kernels.fuse_model`` of the installed package.

    Returns:
        The outcome on the held-out images.

    Raises:
        ValueError: if the options do not fit each other, the data or the checkpoint.
        ImportError: if an optional package is missing, with the command that installs it, or the
            package with the fused blocks.
        OSError: if a file or folder cannot be read or written.
        FloatingPointError: if the loss is no longer finite; the last checkpoint is older.
        Stopped: (a KeyboardInterrupt) after saving, if a signal asked the run to stop.
    """
    if not config.fused:
        fuse = None
    elif fuse is None:
        fuse = installed_fuse()
    with parallel.world_of(config.device) as world:
        out = Path(config.out)
        saved = state.last_checkpoint(out, config)
        source = open_source(config, world)
        if saved is not None:
            state.check_images(saved, source, config)
        run = build(config if saved is None else replace(config, init=None), source, world, fuse)
        if saved is not None:
            state.restore(run, saved, config, world)
        log = None
        if world.is_main:
            state.prepare(out, config)
            log = Log(out, run.step)
            _logger.info("%s", describe(run, source, config, world))
        world.wait()
        try:
            with stop_requests() as requests:
                return _Training(run, source, config, world, log, requests).to_the_end()
        finally:
            if log is not None:
                log.close()


def describe(run: Run, source: Source, config: TrainConfig, world: World) -> str:
    """Say in one line what trains on what, and where."""
    device = str(world.device)
    if world.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(world.device)})"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    shape = " x ".join(map(str, (source.in_channels, *source.image_size)))
    processes = f", {world.size} processes" if world.size > 1 else ""
    begun = f"; continuing from step {run.step}" if run.step else ""
    return (
        f"{config.model} with {parameters:,} parameters on {device}{processes}; "
        f"{config.data}: {len(source.train_labels):,} training and {len(source.test_labels):,} "
        f"held-out images of {shape}, {len(source.classes)} classes{begun}"
    )


@dataclass
class _Training:
    """A run with everything around it; ``requests`` are the signals that ask it to stop."""

    run: Run
    source: Source
    config: TrainConfig
    world: World
    log: Log | None
    requests: list[str]

    def to_the_end(self) -> Summary:
        """Train for all epochs that are left."""
        run, config, world = self.run, self.config, self.world
        for epoch in range(run.step // run.steps_per_epoch, config.epochs):
            began = time.perf_counter()
            self._train_epoch(epoch)
            results = evaluate_run(run, self.source, config, world)
            train_loss, run.loss_sum = run.loss_sum / run.steps_per_epoch, 0.0
            # The weights before the checkpoint that knows of them: a run killed in between repeats
            # the epoch and writes them again.
            state.keep(run, results, self.source, config, world)
            self._write_down(epoch, train_loss, results, time.perf_counter() - began)
            state.save(run, self.source, config, world)
            if epoch + 1 < config.epochs and world.any(bool(self.requests)):
                raise self._stopped()
        kept = run.kept
        if kept is None:  # the weights of a finished run are gone
            results = evaluate_run(run, self.source, config, world)
            kept = state.keep(run, results, self.source, config, world)
        return Summary(Path(config.out), run.step, kept, world.is_main)

    def _train_epoch(self, epoch: int) -> None:
        """Train from wherever in ``epoch`` the run stands to its end."""
        run, config, world = self.run, self.config, self.world
        run.model.train()
        if config.freeze_bn:
            for module in run.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        first = run.step % run.steps_per_epoch
        batches = progress(
            self.source.train_batches(epoch, first),
            total=run.steps_per_epoch - first,
            title=f"epoch {epoch + 1} of {config.epochs}",
            show=config.progress and world.is_main,
        )
        pending: list[tuple[float, Tensor]] = []
        for images, labels in batches:
            pending.append(_step(run, images, labels, config, world))
            run.step += 1
            in_epoch = run.step % run.steps_per_epoch
            due = config.checkpoint_every and run.step % config.checkpoint_every == 0
            asked = self.requests and world.size == 1
            if not (len(pending) == FLUSH_STEPS or in_epoch == 0 or due or asked):
                continue
            stop = self._flush(pending, epoch)
            if in_epoch and (due or stop):  # the end of an epoch has its own, once evaluated
                state.save(run, self.source, config, world)
                if stop:
                    raise self._stopped()

    def _flush(self, pending: list[tuple[float, Tensor]], epoch: int) -> bool:
        """Average the waiting losses over the processes, check them and write them down.

        Returns:
            Whether any process was asked to stop.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        asked = torch.tensor(float(bool(self.requests)), device=self.world.device)
        means = self.world.mean(torch.stack([*(loss for _, loss in pending), asked]))
        *losses, stop = means.tolist()
        first = self.run.step - len(pending) + 1
        rows = [
            {"step": first + i, "epoch": epoch, "lr": lr, "loss": loss}
            for i, ((lr, _), loss) in enumerate(zip(pending, losses, strict=True))
        ]
        pending.clear()
        self.run.loss_sum += sum(losses)
        if self.log is not None:
            self.log.steps(rows)
        for row in rows:
            if not abs(row["loss"]) < float("inf"):
                raise FloatingPointError(
                    f"the loss became {row['loss']} at step {row['step']} (lr {row['lr']:.2e}); "
                    f"{REMEDIES}"
                )
        if self.run.scaler.is_enabled() and self.run.scaler.get_scale() < SMALLEST_SCALE:
            raise FloatingPointError(
                f"gradients overflow float16 at every scale of the loss, by step {self.run.step}; "
                f"{REMEDIES}, and --amp bf16 has no such limit"
            )
        return stop > 0

    def _write_down(
        self, epoch: int, train_loss: float, results: list[Result], seconds: float
    ) -> None:
        if self.log is None:
            return
        row = {"epoch": epoch, "step": self.run.step, "train_loss": train_loss}
        for result in results:
            prefix = "ema_" if result.averaged else ""
            row |= {f"{prefix}loss": result.loss, f"{prefix}accuracy": result.accuracy}
        self.log.epoch(row | {"seconds": round(seconds, 2)})
        averaged = [f" ({r.accuracy:.2%} with averaged weights)" for r in results if r.averaged]
        _logger.info(
            "epoch %d of %d: training loss %.4f, %s%s",
            *(epoch + 1, self.config.epochs, train_loss, results[0], "".join(averaged)),
        )

    def _stopped(self) -> Stopped:
        total = self.config.epochs * self.run.steps_per_epoch
        by = self.requests[0] if self.requests else "another process"
        return Stopped(
            f"stopped by {by} after step {self.run.step} of {total} and saved; "
            f"to continue: smlp train --resume --out {self.config.out}"
        )


def _step(
    run: Run, images: Tensor, labels: Tensor, config: TrainConfig, world: World
) -> tuple[float, Tensor]:
    """Take one optimiser step; return its rate and this process's loss, still on the device."""
    lr = learning_rate(config, run.steps_per_epoch, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=world.device)
    parts = config.accumulate
    pairs = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    for part, (some_images, some_labels) in enumerate(pairs, start=1):
        with parallel.adding_gradients(run.forward, last=part == parts):
            with world.autocast(config.amp):
                logits = run.forward(some_images)
            loss = cross_entropy(
                logits.float(), some_labels, label_smoothing=config.label_smoothing
            )
            loss = loss * (len(some_images) / len(images))
            run.scaler.scale(loss).backward()
        total += loss.detach()
    if config.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema is not None:
        average_weights(run.ema, run.model, config.ema_decay)
    return lr, total
