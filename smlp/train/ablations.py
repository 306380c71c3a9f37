"""Train all ablations in the same way, and tabulate the results."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from smlp.ablations import ABLATIONS
from smlp.files import write_atomically
from smlp.info import parts
from smlp.machine import describe, in_words
from smlp.tables import markdown_table
from smlp.train.config import SMLPNETS, TrainConfig
from smlp.train.loop import train
from smlp.train.models import MODEL, load_network
from smlp.train.parallel import world_of

_logger = logging.getLogger(__name__)

CHOSEN = ("ablation", "seed", "resume", "overwrite", "init", "fused")
"""Fields of :class:`TrainConfig` that the comparison decides: changed blocks cannot be fused."""

DEFAULTS = {"model": "smlpnet_tiny", "out": "runs/ablations"}
"""Defaults that differ from those of :class:`TrainConfig`."""


@dataclass(frozen=True)
class Row:
    """One ablation.

    Attributes:
        name: of the ablation.
        parameters: number of parameters.
        macs: multiply-adds per image.
        accuracies: share of held-out images classified correctly, for each seed.
    """

    name: str
    parameters: int
    macs: int
    accuracies: tuple[float, ...]


def run_ablations(config: TrainConfig, seeds: Sequence[int] = (0,)) -> str:
    """Train every ablation with the same options and write ``ablations.md`` in ``config.out``.

    Each run has its own folder there; those already finished are not repeated.

    Args:
        config: the options; ``ablation``, ``seed`` and ``resume`` are set for each run and
            ``overwrite``, ``init`` and ``fused`` are off.
        seeds: one run of every ablation for each.

    Returns:
        The table, as Markdown, with how it was made below it.

    Raises:
        ValueError: if there is no seed, or the options do not fit each other or the data.
        ImportError: if an optional package is missing, with the command that installs it.
    """
    if not seeds:
        raise ValueError(f"seeds: expected at least one, got {seeds!r}")
    if config.model not in SMLPNETS:
        raise ValueError(f"model: expected one of {', '.join(SMLPNETS)}, got {config.model!r}")
    with world_of(config.device) as world:
        text = f"{as_table(_train_all(config, seeds))}\n\n{_conditions(config, seeds)}\n"
        if world.is_main:
            write_atomically(Path(config.out) / "ablations.md", text.encode())
    return text


def _train_all(config: TrainConfig, seeds: Sequence[int]) -> list[Row]:
    rows = []
    for name in ABLATIONS:
        runs = [
            replace(
                config,
                ablation=name,
                seed=seed,
                resume=True,
                overwrite=False,
                init=None,
                fused=False,
                out=str(Path(config.out) / f"{name}-{seed}"),
            )
            for seed in seeds
        ]
        accuracies = tuple(train(run).held_out.accuracy for run in runs)
        cost = parts(load_network(Path(runs[0].out) / MODEL).network)
        parameters, macs = sum(p.parameters for p in cost), sum(p.macs for p in cost)
        _logger.info("%s: %s", name, ", ".join(f"{a:.2%}" for a in accuracies))
        rows.append(Row(name, parameters, macs, accuracies))
    return rows


def as_table(rows: Sequence[Row]) -> str:
    """Lay rows out as Markdown; several seeds as mean and range."""
    lines = []
    for row in rows:
        accuracies = row.accuracies
        shown = f"{sum(accuracies) / len(accuracies):.2%}"
        if len(accuracies) > 1:
            shown += f" ({min(accuracies):.2%} to {max(accuracies):.2%})"
        cost = (f"{row.parameters:,}", f"{row.macs / 1e6:,.3f}")
        lines.append((row.name, ABLATIONS[row.name], *cost, shown))
    numbers = ("parameters", "MMAC / image", "held-out accuracy")
    head = ("ablation", "what changes", *numbers)
    return "\n".join(markdown_table(head, lines, right=numbers))


def _conditions(config: TrainConfig, seeds: Sequence[int]) -> str:
    """Say what was run: the options other than the defaults, the seeds, versions and device."""
    options = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if getattr(config, field.name) != field.default and field.name not in CHOSEN
    }
    given = ", ".join(f"{name}={value}" for name, value in options.items())
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    facts = describe()
    device = facts["gpu"] if on_gpu else "CPU"
    return (
        f"Data {config.data}, {config.epochs} epochs (accuracy after the {config.keep} one), "
        f"seeds {', '.join(map(str, seeds))}; other than the defaults of `smlp train`: {given}. "
        f"{in_words(facts, ('torch', 'python'))}, {device}. "
        "So short a training on so few images says nothing about ImageNet."
    )
