"""``python -m smlp_kernels.demo.check_kernels``: the kernels against PyTorch in float64.

One block, forward and every gradient, and with ``--trained`` the logits of a trained model before
and after swapping its blocks. Without a GPU it has to be started with ``TRITON_INTERPRET=1``, which
Triton reads when the kernels are imported; :func:`run` does that in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from smlp import SparseMLP
from smlp_kernels.demo.comparison import Difference, block_differences, swap_difference
from smlp_kernels.demo.train import Settings, build_model
from smlp_kernels.functional import fallback_reason

TIMEOUT = 300  # seconds


class KernelCheckError(RuntimeError):
    """The check could not be carried out."""


def run(
    model: SparseMLP, images: Tensor, settings: Settings, device: torch.device
) -> list[Difference]:
    """Check the kernels in a new process: on the GPU, or through the interpreter.

    Args:
        model: trained; its blocks may be of either kind.
        images: ``[N, 1, 28, 28]``; of the interpreter's time they take about 0.3 s each.
        settings: the model was built with them.
        device: where the kernels run.

    Returns:
        The differences of one block, and that of the model's logits, all in float32.

    Raises:
        KernelCheckError: if the process ends without a result, with the end of what it said.
    """
    # The kernels are to run in this process, whatever the training was told to do.
    unset = ("SMLP_KERNELS_DISABLE", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained.pt"
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        saved = {"settings": asdict(settings), "state": state, "images": images.cpu()}
        torch.save(saved, trained)
        command = [sys.executable, "-m", "smlp_kernels.demo.check_kernels", "--json"]
        command += ["--device", str(device), "--trained", str(trained)]
        try:
            process = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise KernelCheckError(f"no result within {TIMEOUT} s") from error
    try:
        return [Difference(**row) for row in json.loads(process.stdout)]
    except (ValueError, TypeError) as error:
        said = (process.stderr.strip() or process.stdout.strip())[-1000:]
        raise KernelCheckError(f"exit code {process.returncode}: {said}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print; returns 0 if every difference is rounding, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m smlp_kernels.demo.check_kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trained", type=Path, help="weights and images that the demo saved")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    reason = fallback_reason(torch.empty(1, 1, 1, 1, device=device))
    if reason is not None:
        hint = "" if device.type != "cpu" else "; on a CPU start this with TRITON_INTERPRET=1"
        parser.error(f"the kernels would not run: {reason}{hint}")
    rows = block_differences(device)
    if arguments.trained is not None:
        rows.append(_trained_difference(arguments.trained, device))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        for row in rows:
            verdict = "rounding" if row.is_rounding else "TOO LARGE"
            print(f"{row.name:40} {row.largest:.2e}  allowed {row.allowed:.2e}  {verdict}")
    return 0 if all(row.is_rounding for row in rows) else 1


def _trained_difference(trained: Path, device: torch.device) -> Difference:
    saved = torch.load(trained, weights_only=True)
    model = build_model(Settings(**saved["settings"]), device)
    model.load_state_dict(saved["state"])
    images = saved["images"].to(device)
    row = swap_difference(model, images, torch.float32)
    return replace(row, name=f"logits of the trained model, {len(images)} images")


if __name__ == "__main__":
    sys.exit(main())
