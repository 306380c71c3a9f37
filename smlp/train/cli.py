"""The command line of training, generated from :class:`smlp.train.config.TrainConfig`."""

import argparse
import logging
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from smlp.train.config import TrainConfig

DESCRIPTION = """\
Train an sMLP network. The folder given by --out receives log.csv (every step), epochs.csv,
last.pt (the run, from which --resume goes on exactly) and model.pt (the trained weights).

  smlp train --data digits --out runs/digits
  torchrun --nproc-per-node 8 -m smlp.train --data /data/imagenet --model smlpnet_tiny ...
"""

# What torch says to every user of these networks although nothing is wrong: layers end in a
# rearranged view, which nothing writes to; a depthwise filter's axis of length 1 has any stride.
_HARMLESS = ("FSDP2-wrapped module", "Grad strides do not match bucket view strides")
_NUMBERS = {"patch_size": int, "d_model": int}


def add_arguments(
    parser: argparse.ArgumentParser, without: Collection[str] = (), **defaults: Any
) -> None:
    """Add one option per field of :class:`TrainConfig`.

    Args:
        parser: what to add them to.
        without: fields that get no option.
        defaults: of fields whose default is another here.
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
            arguments["type"] = _NUMBERS.get(option.name, type(default))
        if default is not None and not isinstance(default, bool):
            arguments["help"] += f" (default {default})"
        parser.add_argument(flag, default=default, **arguments)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``train`` on another command's subparsers; it sets ``run``, which returns a code."""
    parser = subparsers.add_parser(
        "train",
        help="train a network",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train with parsed ``arguments``; prints the outcome and returns the exit code."""
    from smlp.train.loop import train

    names = [option.name for option in fields(TrainConfig)]
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        summary = train(TrainConfig(**{name: getattr(arguments, name) for name in names}))
    except (ValueError, TypeError, ImportError, FloatingPointError) as error:
        print(f"smlp train: {error}", file=sys.stderr)
        return 2
    if summary.is_main:
        print(summary)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m smlp.train``."""
    parser = argparse.ArgumentParser(
        prog="python -m smlp.train",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


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
