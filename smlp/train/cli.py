"""The command line of training, generated from :class:`smlp.train.config.TrainConfig`."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from smlp.train.config import TrainConfig

_logger = logging.getLogger(__name__)

DESCRIPTION = """\
Train an sMLP network. The folder given by --out receives log.csv (every step), epochs.csv,
last.pt (the run, which --resume continues exactly) and model.pt (the trained weights). Ctrl-C
saves and ends.

  smlp train --data digits --out runs/digits
  smlp train --resume --out runs/digits --epochs 20
  torchrun --nproc-per-node 8 -m smlp.train --data /data/imagenet --model smlpnet_tiny ...
"""

# What torch says to every user of these networks although nothing is wrong: layers end in a
# rearranged view, which nothing writes to; a depthwise filter's axis of length 1 has any stride.
# The last is for us: what is to take its place is not in every torch that is supported.
_HARMLESS = (
    "FSDP2-wrapped module",
    "Grad strides do not match bucket view strides",
    "`broadcast_buffers` is deprecated",
)
_SAID_IN_ONE_LINE = (
    *(ValueError, TypeError, ImportError, FloatingPointError, MemoryError),
    torch.OutOfMemoryError,
)
_TYPES = {"patch_size": int, "d_model": int, "init": str}  # of options without a default


def add_arguments(
    parser: argparse.ArgumentParser, without: Collection[str] = (), **defaults: Any
) -> None:
    """Add one option per field of :class:`TrainConfig`; those not given are left out of the result.

    Args:
        parser: what to add them to.
        without: fields that get no option.
        defaults: of fields whose default is another here, for the help.
    """
    for option in fields(TrainConfig):
        if option.name in without:
            continue
        default = defaults.get(option.name, option.default)
        flag = "--" + option.name.replace("_", "-")
        arguments: dict[str, Any] = dict(option.metadata)
        if isinstance(default, bool):
            arguments["action"] = argparse.BooleanOptionalAction
        elif option.name in _INTEGERS:
            arguments |= {"type": _INTEGERS[option.name], "metavar": "N,N"}
        else:
            arguments["type"] = _TYPES.get(option.name, type(default))
        if default is not None and not isinstance(default, bool):
            arguments["help"] += f" (default {default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, **arguments)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``train`` on another command's subparsers; it sets ``run``, which returns a code."""
    parser = subparsers.add_parser(
        "train",
        help="train a network",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=guarded("smlp train", run))


def run(arguments: argparse.Namespace) -> None:
    """Train with parsed ``arguments`` and print the outcome."""
    from smlp.train.loop import train
    from smlp.train.state import options_of

    show_log()
    names = {option.name for option in fields(TrainConfig)}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    if options.get("resume"):
        out = Path(options.get("out", TrainConfig.out))
        saved = options_of(out)
        if not saved:
            _logger.info("no checkpoint to continue from in %s: starting a new run", out)
        options = saved | options
    try:
        summary = train(TrainConfig(**options))
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{str(error).partition('. ')[0]}: a smaller --batch-size, --accumulate, "
            "--grad-checkpointing or --amp need less"
        ) from error
    if summary.is_main:
        print(summary)


def show_log() -> None:
    """Show on standard error what training says, once for all processes, and no harmless noise."""
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    level = logging.INFO if is_main() else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)


def is_main() -> bool:
    """Return whether this is the process that reports, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def guarded(
    command: str, run: Callable[[argparse.Namespace], None]
) -> Callable[[argparse.Namespace], int]:
    """Return ``run`` with errors of usage turned into one line and exit code 2."""

    def code(arguments: argparse.Namespace) -> int:
        try:
            run(arguments)
        except OSError as error:
            about = f"{error.filename}: {error.strerror}" if error.filename else error
            print(f"{command}: {about}", file=sys.stderr)
        except _SAID_IN_ONE_LINE as error:
            print(f"{command}: {error}", file=sys.stderr)
        except KeyboardInterrupt as error:
            print(f"{command}: {str(error) or 'interrupted'}", file=sys.stderr)
            return 130  # as of a process that SIGINT ends
        else:
            return 0
        return 2

    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m smlp.train``."""
    parser = argparse.ArgumentParser(
        prog="python -m smlp.train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return guarded("smlp train", run)(parser.parse_args(argv))


def at_least(least: int, arguments: argparse.Namespace, name: str) -> int:
    """Return the option ``name``.

    Raises:
        ValueError: if it is less than ``least``.
    """
    number: int = getattr(arguments, name)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def height_and_width(text: str) -> tuple[int, ...]:
    """Read a size: ``224`` stands for a square, ``32x64`` or ``32,64`` for a rectangle."""
    sizes = integers(text)
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"expected a size such as 224 or 32x64, got {text!r}")
    return sizes * 2 if len(sizes) == 1 else sizes


def integers(text: str) -> tuple[int, ...]:
    """Read an option such as ``2,2`` or ``32x64``."""
    try:
        numbers = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 2,2, got {text!r}") from None
    return numbers


_INTEGERS = {"image_size": height_and_width, "depth": integers}
