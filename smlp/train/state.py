"""A run on disk: what it needs to continue exactly, and the trained weights for everybody else."""

import logging
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from smlp.train import checkpoint, parallel
from smlp.train.config import TrainConfig
from smlp.train.loaders import Source, counts
from smlp.train.logs import FILES, written
from smlp.train.models import MODEL
from smlp.train.parallel import World
from smlp.train.run import REMEDIES, Result, Run

_logger = logging.getLogger(__name__)

LAST = "last.pt"
_ENTRIES = {
    *("config", "images", "step", "loss_sum", "model", "optimizer", "scaler", "random", "kept")
}


def last_checkpoint(out: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Read the checkpoint that a run continues from.

    Args:
        out: the folder of the run.
        config: the options of the continuation.

    Returns:
        What :func:`save` wrote; None if there is nothing to continue.

    Raises:
        ValueError: if ``out`` cannot be a folder, or holds a run that the options neither continue
            nor overwrite, or whose checkpoint is none or of other options.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got the file {config.out!r}")
    present = [name for name in (LAST, MODEL) if (out / name).exists()] + written(out)
    if config.overwrite or not present:
        return None
    if not config.resume:
        raise ValueError(
            f"out: expected a folder without a run, got {config.out!r} which holds {present[0]}; "
            "choose another, or pass resume to continue it or overwrite to replace it"
        )
    if LAST not in present:
        if MODEL in present:
            raise ValueError(
                f"resume: expected {LAST} in {config.out!r}, got only the weights of a run; "
                "pass overwrite to replace it"
            )
        return None  # stopped before its first checkpoint
    saved = _read(out)
    course = config.course()
    changed = [
        f"{name} {value!r} instead of {saved['config'].get(name)!r}"
        for name, value in course.items()
        if saved["config"].get(name) != value
    ]
    if changed:
        raise ValueError(f"resume: expected the options of the run, got {'; '.join(changed)}")
    return saved


def options_of(out: Path) -> dict[str, Any]:
    """Return the options of the run in ``out``; empty if there is no checkpoint.

    Raises:
        ValueError: if the file is not a checkpoint.
    """
    if not (out / LAST).exists():
        return {}
    known = {field.name for field in fields(TrainConfig)} - {"out", "resume", "overwrite"}
    return {name: value for name, value in _read(out)["config"].items() if name in known}


def _read(out: Path) -> dict[str, Any]:
    saved = checkpoint.load(out / LAST)
    missing = _ENTRIES - saved.keys()
    if missing:
        raise ValueError(
            f"resume: expected a checkpoint of smlp train in {out / LAST}, got one without "
            f"{', '.join(sorted(missing))}"
        )
    return saved


def check_images(saved: dict[str, Any], source: Source, config: TrainConfig) -> None:
    """Refuse to continue with other images.

    Raises:
        ValueError: if ``source`` has other classes, or more or fewer images of one, than the run
            had.
    """
    now = counts(source)
    changed = [
        f"{name} {_shortly(now[name])} instead of {_shortly(before)}"
        for name, before in saved["images"].items()
        if before != now[name]
    ]
    if changed:
        raise ValueError(
            f"data: expected the images of the run in {config.data!r}, got others: "
            f"{'; '.join(changed)}"
        )


def _shortly(entries: list[Any]) -> str:
    total = f"{sum(entries)} images, " if all(isinstance(entry, int) for entry in entries) else ""
    return f"{total}{entries}" if len(entries) <= 12 else f"{total}{entries[:12]} and more"


def restore(run: Run, saved: dict[str, Any], config: TrainConfig, world: World) -> None:
    """Put ``run`` where it stood when ``saved`` was written; all processes have to call this.

    Raises:
        ValueError: if the run has already trained for more epochs than ``config`` asks for.
    """
    if saved["step"] > config.epochs * run.steps_per_epoch:
        raise ValueError(
            f"epochs: expected at least the {-(-saved['step'] // run.steps_per_epoch)} that the "
            f"run has begun, got {config.epochs}"
        )
    checkpoint.load_model_state(run.model, saved["model"])
    checkpoint.load_optimizer_state(run.model, run.optimizer, saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.step = saved["step"]
    run.loss_sum = saved["loss_sum"]
    if saved["kept"] is not None and (Path(config.out) / MODEL).exists():
        run.kept = Result(**saved["kept"])
    if run.ema is not None:
        checkpoint.load_model_state(run.ema.module, saved["ema"])
        run.ema.n_averaged.fill_(saved["ema_steps"])
    if not checkpoint.restore_random_state(saved["random"], world):
        _logger.warning(
            "the checkpoint is of %d processes, this run has %d: random numbers start afresh",
            *(len(saved["random"]), world.size),
        )


def prepare(out: Path, config: TrainConfig) -> None:
    """Make the folder of a run, and remove an earlier run from it if ``overwrite`` is set.

    Raises:
        OSError: naming the path, if that fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        for name in (LAST, MODEL, *FILES):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "tensorboard", ignore_errors=True)


def save(run: Run, source: Source, config: TrainConfig, world: World) -> None:
    """Write everything that :func:`restore` reads; all processes have to call this.

    Raises:
        FloatingPointError: if the weights are not finite; the checkpoint before stays.
        OSError: naming the file, if it cannot be written.
    """
    parallel.average_buffers(run.model, world)
    if not parallel.all_finite(run.model, world):
        raise FloatingPointError(
            f"weights stopped being finite by step {run.step}, the last checkpoint is older; "
            f"{REMEDIES}"
        )
    content = {
        "config": config.as_saved(),
        "images": counts(source),
        "step": run.step,
        "loss_sum": run.loss_sum,
        "model": checkpoint.model_state(run.model),
        "optimizer": checkpoint.optimizer_state(run.model, run.optimizer),
        "scaler": run.scaler.state_dict(),
        "random": checkpoint.random_states(world),
        "kept": None if run.kept is None else asdict(run.kept),
    }
    if run.ema is not None:
        content["ema"] = checkpoint.model_state(run.ema.module)
        content["ema_steps"] = int(run.ema.n_averaged)
    if world.is_main:
        checkpoint.save(Path(config.out) / LAST, content)
    world.wait()


def keep(
    run: Run, results: list[Result], source: Source, config: TrainConfig, world: World
) -> Result:
    """Write the best or the last weights, as ``config.keep`` says, if they are not written yet.

    The file is what :func:`smlp.train.models.load_network` reads: weights, how to build the network
    and what its images and its outputs are. All processes have to call this.

    Returns:
        What the file holds now.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    chosen = results[-1]  # the averaged weights, if there are any
    if config.keep == "best":
        chosen = min(results, key=Result.rank)
        if run.kept is not None and run.kept.rank() <= chosen.rank():
            return run.kept
    model = run.ema.module if chosen.averaged and run.ema is not None else run.model
    weights = checkpoint.model_state(model)
    if world.is_main:
        content: dict[str, Any] = {
            "model": config.model,
            "arguments": run.arguments,
            "state_dict": weights,
            "classes": source.classes,
            "data": config.as_saved()["data"],
            "mean": source.mean,
            "std": source.std,
            "crop": source.crop,
            "result": asdict(chosen),
        }
        checkpoint.save(Path(config.out) / MODEL, content)
    run.kept = chosen
    world.wait()
    return chosen
