"""The command line of the demo: what it runs, in order, and what it prints."""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from smlp.data import ImageSplit, mnist5k
from smlp_kernels.demo import check_kernels, report
from smlp_kernels.demo.comparison import block_receptive_fields, swap_difference
from smlp_kernels.demo.train import Settings, build_model, train, training_dtype
from smlp_kernels.functional import fallback_reason

CHECKED_IMAGES = 32  # swapped through the kernels in the interpreter, which is slow


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 if all is as it must be, 1 if not, 2 if it cannot run."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    device = _device(parser, arguments.device)
    missing = [name for name in ("matplotlib", "tqdm") if not _installed(name)]
    if missing:
        parser.error(f"missing {', '.join(missing)}: pip install {' '.join(missing)}")
    settings = Settings(epochs=arguments.epochs, seed=arguments.seed)
    fallback = _training_fallback(settings, device)
    if fallback is None and device.type == "cpu":
        parser.error(
            "TRITON_INTERPRET=1 is set: training through the interpreter would take hours; unset "
            "it, the demo sets it for its check of the kernels alone"
        )
    try:
        split = mnist5k()
    except ImportError as error:
        parser.error(f"no images to train on: {error}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot create the folder {arguments.out}: {error.strerror}")

    torch.backends.cudnn.deterministic = True  # the seed is to decide everything
    try:
        findings = run(split, settings, device, fallback)
    except FloatingPointError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    command = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    files = report.write(findings, arguments.out, command)
    say("", *report.summary(findings), "", "Written:", *(f"  {path}" for path in files))
    problems = findings.problems()
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def run(
    split: ImageSplit, settings: Settings, device: torch.device, fallback: str | None
) -> report.Findings:
    """Train both models, swap their blocks, check the kernels and measure the receptive field.

    Args:
        split: MNIST images.
        settings: of both trainings.
        device: where everything runs; with a fallback, the check of the kernels is interpreted.
        fallback: why the fused blocks train on PyTorch; None where they run on the kernels.

    Returns:
        What was measured.
    """
    model = build_model(settings, device)
    sizes = ", then ".join(f"{height}x{width}" for height, width in model.sizes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"MNIST: {len(split.train_images)} training and {len(split.test_images)} held-out images.",
        f"SparseMLP: {sum(settings.depth)} sMLP blocks on {sizes}; {parameters:,} parameters.",
        f"Training twice from seed {settings.seed}, {settings.epochs} epochs each, "
        f"on {report.environment(device)['device']}.",
    )
    del model  # its memory is not the training's
    reference = train(split, settings, device, fused=False, label="reference blocks")
    fused = train(split, settings, device, fused=True, label="fused blocks    ")
    say("Swapping the blocks of both trained models ...")
    images = split.test_images.to(device)
    types = dict.fromkeys([torch.float32, training_dtype(device)])
    swaps = [
        swap_difference(trained.model, images, dtype)
        for trained in (reference, fused)
        for dtype in types
    ]
    say(f"{report.kernels_title(fallback)}: one block and the trained model against PyTorch ...")
    kernel_error, kernels = None, []
    check_device, checked = device, images
    if fallback is not None:  # as on a CPU: the interpreter runs the kernels anywhere
        check_device, checked = torch.device("cpu"), images[:CHECKED_IMAGES]
    try:
        kernels = check_kernels.run(reference.model, checked, settings, check_device)
    except check_kernels.KernelCheckError as error:
        kernel_error = str(error)
    return report.Findings(
        settings=settings,
        device=device,
        fallback=fallback,
        reference=reference,
        fused=fused,
        swaps=swaps,
        kernels=kernels,
        kernel_error=kernel_error,
        fields=block_receptive_fields(fused.model, device),
    )


def say(*lines: str) -> None:
    """Print lines at once, also where the output is a file."""
    print(*lines, sep="\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smlp_kernels.demo",
        description="Train a small SparseMLP on real MNIST images, once with reference and once "
        "with fused blocks; compare, and check the kernels. Exits with 1 if something is off.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the files")
    parser.add_argument("--epochs", type=_at_least(1), default=Settings.epochs, help="of each")
    parser.add_argument("--seed", type=_at_least(0), default=Settings.seed, help="of both")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {minimum}, got {text!r}"
            )
        return int(text)

    return parse


def _device(parser: argparse.ArgumentParser, text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device: expected auto, cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"--device: {text} is not there; PyTorch sees {torch.cuda.device_count()} GPUs"
        )
    return device


def _training_fallback(settings: Settings, device: torch.device) -> str | None:
    """Why the fused blocks will not run on the kernels in training, or None."""
    shape = (1, settings.d_model, 14, 14)
    return fallback_reason(torch.empty(shape, device=device, dtype=training_dtype(device)))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
