"""A run on disk: what it needs to go on exactly, and the trained weights for everybody else."""

import logging
from pathlib import Path
from typing import Any

from smlp.train import checkpoint, parallel
from smlp.train.config import TrainConfig
from smlp.train.loaders import Source
from smlp.train.models import MODEL
from smlp.train.parallel import World
from smlp.train.run import Run

_logger = logging.getLogger(__name__)

LAST = "last.pt"


def last_checkpoint(out: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Read the checkpoint that a run goes on from.

    Args:
        out: the folder of the run.
        config: the options of the continuation.

    Returns:
        What :func:`save` wrote; None where there is nothing to go on from.

    Raises:
        ValueError: if there is one and ``config.resume`` is off, if it is no checkpoint, or if its
            run had other options.
    """
    path = out / LAST
    if not path.exists():
        return None
    if not config.resume:
        raise ValueError(
            f"out: expected a folder without a run, got {config.out!r} which holds {LAST}; "
            "choose another or pass resume to go on with it"
        )
    saved = checkpoint.load(path)
    missing = {"config", "step", "model", "optimizer", "scheduler", "random"} - saved.keys()
    if missing:
        raise ValueError(
            f"resume: expected a checkpoint of smlp train in {path}, got one without "
            f"{', '.join(sorted(missing))}"
        )
    course = config.course()
    changed = [
        f"{name} was {saved['config'].get(name)!r}, now {value!r}"
        for name, value in course.items()
        if saved["config"].get(name) != value
    ]
    if changed:
        raise ValueError(f"resume: expected the options of the run, got {'; '.join(changed)}")
    return saved


def restore(run: Run, saved: dict[str, Any], config: TrainConfig, world: World) -> None:
    """Put ``run`` where it stood when ``saved`` was written; all processes have to call this."""
    checkpoint.load_model_state(run.model, saved["model"])
    checkpoint.load_optimizer_state(run.model, run.optimizer, saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    run.step = saved["step"]
    run.loss_sum = saved["loss_sum"]
    if run.ema is not None:
        checkpoint.load_model_state(run.ema.module, saved["ema"])
        run.ema.n_averaged.fill_(saved["ema_steps"])
    if not checkpoint.restore_random_state(saved["random"], world):
        _logger.warning(
            "the checkpoint is of %d processes, this run has %d: random numbers start anew",
            *(len(saved["random"]), world.size),
        )
    if world.is_main:
        _logger.info("going on from step %d of %s", run.step, Path(config.out) / LAST)


def save(run: Run, config: TrainConfig, world: World) -> None:
    """Write everything that :func:`restore` reads; all processes have to call this."""
    parallel.average_buffers(run.model, world)
    content = {
        "config": config.course(),
        "step": run.step,
        "loss_sum": run.loss_sum,
        "model": checkpoint.model_state(run.model),
        "optimizer": checkpoint.optimizer_state(run.model, run.optimizer),
        "scheduler": run.scheduler.state_dict(),
        "random": checkpoint.random_states(world),
    }
    if run.ema is not None:
        content["ema"] = checkpoint.model_state(run.ema.module)
        content["ema_steps"] = int(run.ema.n_averaged)
    if world.is_main:
        checkpoint.save(Path(config.out) / LAST, content)
    world.wait()


def save_weights(run: Run, source: Source, config: TrainConfig, world: World) -> None:
    """Write what :func:`smlp.train.models.load_network` reads; all processes have to call this.

    That is the trained weights, the averaged ones if there are, how to build the network and how
    its images were normalised.
    """
    weights = checkpoint.model_state(run.ema.module if run.ema is not None else run.model)
    if world.is_main:
        content: dict[str, Any] = {"model": config.model, "arguments": run.arguments}
        content |= {"state_dict": weights, "mean": source.mean, "std": source.std}
        checkpoint.save(Path(config.out) / MODEL, content)
    world.wait()
