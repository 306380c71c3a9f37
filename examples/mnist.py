"""The fused block in a real training: ``make demo``, or ``python -m examples.mnist``.

Trains a small SparseMLP on 5,000 real MNIST images by ``smlp.train``: with plain blocks and, on a
GPU, again with fused ones. Then swaps the blocks of the trained model for fused ones and compares
its logits, and a block's gradients, with float64; without a GPU the kernels run in Triton's
interpreter for that. Draws the losses and the receptive field. Needs the ``demo`` extra.
"""

import argparse
import copy
import csv
import gc
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import triton
from torch import Tensor, nn

from smlp import SMLPBlock, receptive_field
from smlp.data import mnist5k
from smlp.files import write_atomically
from smlp.machine import describe, in_words
from smlp.pictures import draw_receptive_fields, new_figure
from smlp.testing import EPS, Comparison, compare
from smlp.train import TrainConfig, train
from smlp.train.cli import add_arguments, guarded, show_log
from smlp.train.models import MODEL, load_network
from smlp_kernels import check_block, fallback_reason, fuse_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python -m examples.mnist"
SETTINGS = TrainConfig(
    data="mnist5k",
    out="demo_out",
    epochs=6,
    batch_size=100,
    lr=4e-3,
    label_smoothing=0.1,
    overwrite=True,
)
OPTIONS = ("out", "epochs", "seed", "device")  # of the settings, on the command line
MIN_ACCURACY = 0.95
INTERPRETED_IMAGES = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, or 2 if it cannot run; exits with 1 if something is off."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Train a small SparseMLP on MNIST images, swap its blocks for fused ones and "
        "compare; exits with 1 if something is off.",
    )
    others = [option.name for option in fields(TrainConfig) if option.name not in OPTIONS]
    add_arguments(parser, others, out=SETTINGS.out, epochs=SETTINGS.epochs)
    parser.add_argument(
        "--check", metavar="MODEL", help="only compare the blocks of the model.pt of a run"
    )
    arguments = parser.parse_args(argv)
    return guarded(COMMAND, run if arguments.check is None else check)(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Train, compare, draw, and report the results."""
    config = replace(SETTINGS, **{k: v for k, v in vars(arguments).items() if k in OPTIONS})
    losses = new_figure(7.0, 3.9)  # before training: if matplotlib is missing, this says so
    show_log()
    fallback: str | None = "the device is cpu"
    if uses_gpu(config.device):
        config = replace(config, amp="bf16")
        fallback = fallback_reason(torch.empty(1, 32, 14, 14, device="cuda", dtype=torch.bfloat16))

    out = Path(config.out)
    trainings = {"plain": training(replace(config, out=str(out / "plain")))}
    if fallback is None:
        trainings["fused"] = training(replace(config, out=str(out / "fused"), fused=True))
        how = f"Trained with both kinds of blocks on {torch.cuda.get_device_name()}, in bfloat16:"
    else:
        how = f"Trained with plain blocks alone; fused ones would run the same code: {fallback}."
    lines = [how, *(f"{name} blocks: {result}." for name, result in trainings.items())]
    problems = [
        f"held-out accuracy with {name} blocks: expected at least {MIN_ACCURACY:.0%}, "
        f"got {result.accuracy:.2%}"
        for name, result in trainings.items()
        if not result.accuracy >= MIN_ACCURACY
    ]

    model = out / "plain" / MODEL
    unfit = None if fallback is None else interpreter_problem(triton.__version__, numpy.__version__)
    if unfit is None:
        print("Comparing plain and fused blocks in the trained model ...", flush=True)
        checked, failures = check_in_child(model, "cpu" if fallback else "cuda")
        lines += checked
        problems += failures
    else:
        lines.append(f"The kernels were not run: {unfit}.")

    regions = block_receptive_fields(load_network(model).network)
    one, two = regions.values()
    lines.append(
        f"The centre depends on {int((one > 0).sum())} of {one.numel()} positions after one block, "
        f"on {int((two > 0).sum())} after two."
    )
    if not is_cross(one) or not bool((two > 0).all()):
        problems.append("receptive fields: expected a row and a column, then the whole map")

    draw_losses(losses, trainings)
    losses.savefig(out / "loss.png")
    title = "What the central position depends on"
    draw_receptive_fields(regions, title).savefig(out / "receptive_field.png")
    lines += [f"FAILED: {problem}" for problem in problems]
    command = f"{COMMAND} --epochs {config.epochs} --seed {config.seed} --device {config.device}"
    lines += ["", f"{command}: {in_words(describe(), ('torch', 'triton', 'python'))}"]
    write_atomically(out / "report.txt", "\n".join([*lines, ""]).encode())
    print("", *lines, f"Written to {out}: report.txt, loss.png, receptive_field.png", sep="\n")
    if problems:
        sys.exit(1)


def uses_gpu(device: str) -> bool:
    """Whether ``smlp.train`` takes a GPU if told ``device``."""
    return device != "cpu" and torch.cuda.is_available()


@dataclass(frozen=True)
class Training:
    """The outcome of a run of ``smlp.train``.

    Attributes:
        accuracy: share of the held-out images classified correctly.
        losses: of every step.
        epoch_losses: mean of each epoch's.
        epoch_seconds: wall time of an epoch with its evaluation, on average; without the first,
            which compiles, if there are others.
        peak_bytes: most GPU memory in use at once, less what was in use before; None on a CPU.
    """

    accuracy: float
    losses: list[float]
    epoch_losses: list[float]
    epoch_seconds: float
    peak_bytes: int | None

    def __str__(self) -> str:
        memory = "" if self.peak_bytes is None else f", peak of {self.peak_bytes / 2**20:.0f} MiB"
        return (
            f"held-out accuracy {self.accuracy:.2%}, training loss {self.epoch_losses[-1]:.4f}, "
            f"{self.epoch_seconds:.2f} s per epoch{memory}"
        )


def training(config: TrainConfig) -> Training:
    """Train and read the logs of the run."""
    on_gpu = uses_gpu(config.device)
    before = 0
    if on_gpu:
        gc.collect()  # an earlier run's optimizer and model refer to each other
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    summary = train(config, fuse=fuse_model)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    epochs, steps = (_rows(summary.out / name) for name in ("epochs.csv", "log.csv"))
    seconds = [float(row["seconds"]) for row in epochs]
    timed = seconds[1:] or seconds
    return Training(
        summary.held_out.accuracy,
        [float(row["loss"]) for row in steps],
        [float(row["train_loss"]) for row in epochs],
        sum(timed) / len(timed),
        peak,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def interpreter_problem(triton_version: str, numpy_version: str) -> str | None:
    """Why Triton's interpreter does not work with this NumPy; None if it does."""
    numpy_release = tuple(map(int, numpy_version.split(".")[:2]))
    if triton_version.startswith("3.6.") and numpy_release >= (2, 4):
        return (
            f"the interpreter of Triton {triton_version} does not work with NumPy {numpy_version}; "
            "pip install 'numpy<2.4', or a later Triton"
        )
    return None


def check_in_child(model: Path, device: str) -> tuple[list[str], list[str]]:
    """Run ``--check`` in a new process, because Triton fixes at import where kernels run.

    Returns:
        The lines that it printed, and what failed.
    """
    # The kernels must run there, whatever the environment says for training.
    unset = ("SMLP_KERNELS_DISABLE", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "examples.mnist", "--check", str(model.resolve())]
    command += ["--device", device]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    failure = f"the comparison of the blocks: exit code {child.returncode}, see above"
    return child.stdout.splitlines(), [failure] if child.returncode else []


def check(arguments: argparse.Namespace) -> None:
    """Swap the blocks of a trained model, compare with float64 and print three lines.

    Raises:
        ValueError: if the kernels would not run here, or there is no such model.
    """
    on_gpu = uses_gpu(getattr(arguments, "device", SETTINGS.device))
    device = "cuda" if on_gpu else "cpu"
    network = load_network(arguments.check).network.to(device)
    first = next(module for module in network.modules() if isinstance(module, SMLPBlock))
    # cuDNN's TF32, its default, would be coarser than the kernels
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        try:
            block = check_block(first.height, first.width, first.channels, device=device)
        except AssertionError as error:  # its way to say that the kernels are wrong
            sys.exit(f"{COMMAND}: {error}")
        images = mnist5k().test_images[: None if on_gpu else INTERPRETED_IMAGES].to(device)
        logits = compare_logits(network, images)
    worst = max(block.results, key=lambda result: result.error)
    where = "on the GPU" if on_gpu else "in Triton's interpreter"
    print(f"Swapped the trained model's blocks; the kernels ran {where}, on {len(images)} images.")
    print(
        f"Logits are {logits.error:.1e} from float64, with plain blocks {logits.peer_error:.1e}: "
        f"{logits.problem or 'equal to rounding'}."
    )
    print(
        f"A {block.block}: output and {len(block.results) - 1} gradients are equal to rounding, "
        f"{worst.error:.1e} from float64 or less."
    )
    if logits.problem is not None:
        sys.exit(f"{COMMAND}: logits with fused blocks: {logits.problem}")


@torch.no_grad()
def compare_logits(network: nn.Module, images: Tensor) -> Comparison:
    """Compare the logits of a network after swapping its blocks with those before, and float64.

    Args:
        network: with plain blocks, in eval mode; it is not changed.
        images: ``[N, C, H, W]``, float32, on the device of the network.
    """
    fused, exact = copy.deepcopy(network), copy.deepcopy(network).double()
    fuse_model(fused)
    return compare(fused(images), exact(images.double()), network(images), eps=EPS[torch.float32])


def block_receptive_fields(network: nn.Module) -> dict[str, Tensor]:
    """Measure what the centre depends on after the first and after the second sMLP block.

    Only the blocks, without the convolutions between them; they are linear, so any input shows it.

    Returns:
        The title of each panel and its ``[H, W]``.
    """
    first, second = [module for module in network.modules() if isinstance(module, SMLPBlock)][:2]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, first.channels, first.height, first.width, generator=generator)
    return {
        "after one block": receptive_field(first, noise),
        "after two blocks": receptive_field(nn.Sequential(first, second), noise),
    }


def is_cross(field: Tensor) -> bool:
    """Whether exactly the centre's row and column of ``[H, W]`` are reached."""
    expected = torch.zeros_like(field, dtype=torch.bool)
    expected[field.shape[0] // 2] = True
    expected[:, field.shape[1] // 2] = True
    return torch.equal(field > 0, expected)


def draw_losses(figure: "Figure", trainings: Mapping[str, Training]) -> None:
    """Draw the loss of every step, faintly, and its mean over half an epoch."""
    from matplotlib import style

    with style.context("tableau-colorblind10"):
        axis = figure.subplots()
    # The second curve is thin and dashed, so that the first stays visible where they coincide.
    looks: Any = ({"linewidth": 4.0}, {"linewidth": 1.6, "linestyle": "--"})
    for (name, training), look in zip(trainings.items(), looks, strict=False):
        losses = torch.tensor(training.losses, dtype=torch.float64)
        steps = len(losses) // len(training.epoch_losses)  # of an epoch
        epochs = torch.arange(1, len(losses) + 1) / steps
        window = max(1, steps // 2)
        means = losses.unfold(0, window, 1).mean(1)
        centres = epochs[(window - 1) // 2 :][: len(means)]
        (line,) = axis.plot(centres, means, label=f"{name} blocks", **look)
        axis.plot(epochs, losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss (smoothed labels)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    axis.set_title("SparseMLP on MNIST", fontsize=11)


if __name__ == "__main__":
    sys.exit(main())
