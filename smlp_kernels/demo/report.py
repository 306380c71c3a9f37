"""What the demo found, judged and written down."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smlp_kernels.demo.comparison import Difference, is_cross
from smlp_kernels.demo.figures import draw_fields, draw_losses
from smlp_kernels.demo.train import Run, Settings, training_dtype

MIN_ACCURACY = 0.95


@dataclass(frozen=True)
class Findings:
    """Everything the demo measured.

    Attributes:
        settings: of both trainings.
        device: of both trainings.
        fallback: why the fused blocks ran on PyTorch in training; None where the kernels ran.
        reference: the training with reference blocks.
        fused: the training with fused blocks.
        swaps: logits before and after swapping the blocks of a trained model.
        kernels: the kernels' differences from float64 PyTorch, and of logits with them.
        kernel_error: why the kernels could not be checked; None where they were.
        fields: receptive fields ``[H, W]``, after one block and after two.
    """

    settings: Settings
    device: torch.device
    fallback: str | None
    reference: Run
    fused: Run
    swaps: Sequence[Difference]
    kernels: Sequence[Difference]
    kernel_error: str | None
    fields: Mapping[str, Tensor]

    @property
    def same_losses(self) -> bool:
        """Whether the two trainings had bitwise the same losses."""
        return torch.equal(self.reference.losses, self.fused.losses)

    def problems(self) -> list[str]:
        """What the demo fails for; empty if all is as it must be."""
        found = []
        for name, run in (("reference", self.reference), ("fused", self.fused)):
            if not run.accuracy >= MIN_ACCURACY:
                found.append(
                    f"held-out accuracy of the {name} blocks is {run.accuracy:.1%}, "
                    f"expected at least {MIN_ACCURACY:.0%}"
                )
        if self.kernel_error is not None:
            found.append(f"the kernels could not be checked: {self.kernel_error}")
        for what, rows in (("swapping", self.swaps), ("kernels", self.kernels)):
            found += [
                f"{what}, {row.name}: difference {row.largest:.2e} is beyond rounding, "
                f"which explains {row.allowed:.2e}"
                for row in rows
                if not row.is_rounding
            ]
        one, two = self.fields.values()
        if not is_cross(one):
            found.append("the receptive field of one block is no cross")
        if not bool((two > 0).all()):
            found.append("the receptive field of two blocks is not the whole feature map")
        return found

    def path(self) -> str:
        """Which code the fused blocks ran on in training, in a sentence."""
        if self.fallback is None:
            return "In training the fused blocks ran on the Triton kernels, in bfloat16 autocast."
        return f"In training the fused blocks used the reference path: {self.fallback}."

    def losses(self) -> str:
        """How the loss curves compare, in a sentence."""
        if self.same_losses:
            why = ": both ran the same code" if self.fallback is not None else ""
            return f"The two loss curves are bitwise identical{why}."
        largest = (self.reference.losses - self.fused.losses).abs().max().item()
        return (
            f"Same seed, same batches; the losses of a step differ by {largest:.2e} at the most: "
            "rounding differs, and training amplifies it."
        )


def write(findings: Findings, folder: Path, command: str) -> list[Path]:
    """Write ``table.md``, ``results.json``, ``loss.png`` and ``receptive_field.png``.

    Args:
        findings: what was measured.
        folder: where the files go; it exists.
        command: how the demo was started.

    Returns:
        The files.
    """
    paths = [folder / name for name in ("table.md", "results.json", "loss.png")]
    paths.append(folder / "receptive_field.png")
    paths[0].write_text(table(findings, command))
    paths[1].write_text(json.dumps(as_json(findings, command), indent=2) + "\n")
    title = "SparseMLP on MNIST"
    if findings.same_losses:
        title += ": bitwise identical"
        title += ", both on the reference path" if findings.fallback is not None else ""
    runs = (findings.reference, findings.fused)
    losses = draw_losses(runs[0].losses, runs[1].losses, runs[0].steps_per_epoch, title)
    losses.savefig(paths[2])
    draw_fields(findings.fields).savefig(paths[3])
    return paths


def table(findings: Findings, command: str) -> str:
    """Markdown: the two trainings, the differences, and what they were measured on."""
    reference, fused = findings.reference, findings.fused
    facts = ", ".join(f"{name} {value}" for name, value in environment(findings.device).items())
    rows = [
        ("held-out accuracy", f"{reference.accuracy:.1%}", f"{fused.accuracy:.1%}"),
        ("loss, last epoch", *(f"{last_loss(run):.4f}" for run in (reference, fused))),
        ("time of the training steps", *(_time(findings, run) for run in (reference, fused))),
        ("peak GPU memory of training", *(_memory(run) for run in (reference, fused))),
    ]
    lines = ["# Reference and fused blocks in a SparseMLP on MNIST", ""]
    lines += [f"`{command}`: {facts}", "", findings.path(), findings.losses(), ""]
    lines += ["| | reference blocks | fused blocks |", "|---|---|---|"]
    lines += [f"| {name} | {left} | {right} |" for name, left, right in rows]
    for title, differences in (
        (swaps_title(findings.fallback), findings.swaps),
        (f"{kernels_title(findings.fallback)} against PyTorch", findings.kernels),
    ):
        lines += ["", f"## {title}", ""]
        lines += ["| | largest difference | explained by rounding |", "|---|---|---|"]
        lines += [f"| {row.name} | {row.largest:.2e} | {row.allowed:.2e} |" for row in differences]
    problems = findings.problems()
    if problems:
        lines += ["", "## Failed", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def as_json(findings: Findings, command: str) -> dict[str, Any]:
    """The same, and the losses of every step, for programs."""

    def run(run: Run) -> dict[str, Any]:
        return {
            "accuracy": run.accuracy,
            "seconds": run.seconds,
            "peak_bytes": run.peak_bytes,
            "losses": run.losses.tolist(),
        }

    return {
        "command": command,
        "environment": environment(findings.device),
        "settings": asdict(findings.settings),
        "fallback": findings.fallback,
        "training_dtype": str(training_dtype(findings.device)).removeprefix("torch."),
        "reference": run(findings.reference),
        "fused": run(findings.fused),
        "losses_bitwise_identical": findings.same_losses,
        "swaps": [asdict(row) for row in findings.swaps],
        "kernels": [asdict(row) for row in findings.kernels],
        "receptive_field": {
            name: {"reached": int((field > 0).sum()), "pixels": field.numel()}
            for name, field in findings.fields.items()
        },
        "problems": findings.problems(),
    }


def summary(findings: Findings) -> list[str]:
    """Lines for a terminal."""
    reference, fused = findings.reference, findings.fused
    lines = [
        findings.path(),
        findings.losses(),
        f"Held-out accuracy: reference {reference.accuracy:.1%}, fused {fused.accuracy:.1%}.",
    ]
    if findings.fallback is None:
        lines += [
            f"Training steps: reference {reference.seconds:.1f} s, fused {fused.seconds:.1f} s.",
            f"Peak GPU memory: reference {_memory(reference)}, fused {_memory(fused)}.",
        ]
    else:
        lines.append("Time and memory are not compared: both trainings ran the same code.")
    lines.append(f"{swaps_title(findings.fallback)}, largest difference:")
    lines += [_line(row) for row in findings.swaps]
    lines.append(f"{kernels_title(findings.fallback)} against PyTorch, largest difference:")
    lines += [_line(row) for row in findings.kernels]
    reached = (
        f"{int((field > 0).sum())} of {field.numel()} pixels {name}"
        for name, field in findings.fields.items()
    )
    lines.append(f"The centre depends on {', '.join(reached)}.")
    return lines


def swaps_title(fallback: str | None) -> str:
    """What the comparison of logits is of; with a fallback it compares nothing."""
    same = "" if fallback is None else " (the same code here)"
    return f"Logits of a trained model before and after swapping its blocks{same}"


def kernels_title(fallback: str | None) -> str:
    """What the check of the kernels ran on, given why training did not run on them, if so."""
    where = "on the GPU" if fallback is None else "in Triton's interpreter"
    return f"Kernels {where}"


def environment(device: torch.device) -> dict[str, str]:
    """Device and versions."""
    import triton

    name = f"CPU {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, "python": platform.python_version(), **versions}


def last_loss(run: Run) -> float:
    """Mean loss of the last epoch."""
    return run.losses[-run.steps_per_epoch :].mean().item()


def _line(row: Difference) -> str:
    return f"  {row.name:40} {row.largest:.1e}  (rounding explains {row.allowed:.1e})"


def _time(findings: Findings, run: Run) -> str:
    return f"{run.seconds:.1f} s" if findings.fallback is None else "not compared: same code"


def _memory(run: Run) -> str:
    return f"{run.peak_bytes / 2**20:.0f} MiB" if run.peak_bytes is not None else "not measured"
