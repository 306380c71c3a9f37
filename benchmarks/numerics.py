"""``python -m benchmarks.numerics``: errors against float64, written into docs/numerics.md.

Every stage shape and type, forward and backward, the fused block beside PyTorch's own operators at
the same precision. Without a GPU the kernels run in Triton's interpreter, on scaled-down shapes and
without bfloat16 and TF32, which the interpreter does not have.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import matmul_precision
from benchmarks.environment import ROOT, describe
from benchmarks.providers import gradient_targets, relative_error, run_oracle
from benchmarks.shapes import DTYPES, STAGES, Shape
from smlp import SMLPBlock

PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- begin: python -m benchmarks.numerics -->", "<!-- end -->"
FACTS = ("commit", "torch", "triton", "driver_version", "cuda")
ON_CPU = ("fp16", "fp32")
CPU_CHANNELS = 8  # channels are divided by this without a GPU
GPU_BATCH = 8
COLUMNS = ("output", "d x", "d weights")


class Row(NamedTuple):
    """Relative errors of one shape and type; the weights' is the largest of their gradients'."""

    shape: Shape
    dtype: str
    fused: tuple[float, float, float]  # as COLUMNS
    plain: tuple[float, float, float]


def measured_shapes(on_gpu: bool) -> list[Shape]:
    """The stages as they are but for the batch, or scaled down to what the interpreter can do."""
    if on_gpu:
        return [shape_of(s, GPU_BATCH, s.channels) for s in STAGES]
    return [shape_of(s, 1, s.channels // CPU_CHANNELS) for s in STAGES]


def shape_of(stage: Shape, batch: int, channels: int) -> Shape:
    return Shape(stage.name, batch, channels, stage.height, stage.width)


def measure(shape: Shape, dtype: str, device: str) -> Row:
    """Errors of both blocks on the same, already rounded numbers.

    Raises:
        RuntimeError: if the fused block would run on PyTorch, which would be compared with itself.
    """
    from smlp_kernels import FusedSMLPBlock, fallback_reason  # after TRITON_INTERPRET is set

    torch.manual_seed(0)
    size = (shape.height, shape.width, shape.channels)
    plain = SMLPBlock(*size, device=device, dtype=DTYPES[dtype])
    fused = FusedSMLPBlock(*size, device=device, dtype=DTYPES[dtype])
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, device=device) + 0.25
    x = x.to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    if reason := fallback_reason(x):
        raise RuntimeError(f"the kernels do not run for {shape} in {dtype}: {reason}")
    oracle = run_oracle(plain, x, dy)
    with matmul_precision(dtype):
        errors = [errors_of(block, x, dy, oracle.output, oracle.gradients) for block in
                  (fused, plain)]  # fmt: skip
    return Row(shape, dtype, *errors)


def errors_of(
    block: SMLPBlock, x: Tensor, dy: Tensor, output: Tensor, gradients: dict[str, Tensor]
) -> tuple[float, float, float]:
    """Relative errors of a forward and backward pass, as ``COLUMNS``."""
    targets = gradient_targets(block, x)
    y = block(x)
    actual = torch.autograd.grad(y, list(targets.values()), dy)
    of = {
        name: relative_error(gradient, gradients[name])
        for name, gradient in zip(targets, actual, strict=True)
    }
    dx = of.pop("x")
    return relative_error(y, output), dx, max(of.values())


def rows(on_gpu: bool) -> Iterator[Row]:
    """Every shape in every type that this machine has."""
    for dtype in DTYPES if on_gpu else ON_CPU:
        for shape in measured_shapes(on_gpu):
            yield measure(shape, dtype, "cuda" if on_gpu else "cpu")


def table(measured: list[Row], on_gpu: bool) -> str:
    """Markdown: what it was measured on, then a line a row."""
    facts = describe()
    device = facts["gpu"] if on_gpu else "Triton interpreter on CPU"
    head = [
        f"{device}, "
        + ", ".join(f"{name} {facts[name]}" for name in FACTS if facts.get(name) is not None)
        + ". Reproduce: `python -m benchmarks.numerics`.",
        "",
    ]
    if not on_gpu:
        head += [
            f"Batch 1, channels of the stages divided by {CPU_CHANNELS}. Rows of bfloat16 and TF32 "
            "need a GPU: the interpreter has neither.",
            "",
        ]
    names = " | ".join(f"{column}, fused | PyTorch" for column in COLUMNS)
    lines = [f"| stage | B, C, H, W | type | {names} |", "|---|---|---|" + "---|" * 6]
    for row in measured:
        s = row.shape
        errors = " | ".join(
            f"{value:.1e}" for pair in zip(row.fused, row.plain, strict=True) for value in pair
        )
        size = f"{s.batch}, {s.channels}, {s.height}, {s.width}"
        lines.append(f"| {s.name} | {size} | {row.dtype} | {errors} |")
    return "\n".join([*head, *lines])


def around_the_table(page: Path) -> tuple[str, str]:
    """What stands before and after the table in ``page``, the markers included.

    Raises:
        ValueError: if the page cannot be read and written, or the markers are not in it.
    """
    if not page.is_file() or not os.access(page, os.R_OK | os.W_OK):
        raise ValueError(f"{page}: expected a file that can be read and written")
    if not os.access(page.parent, os.W_OK):
        raise ValueError(f"{page}: expected a folder that can be written")
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if text.count(BEGIN) != 1 or not end:
        raise ValueError(f"{page}: expected the marker {BEGIN} once, and {END} after it")
    return before + BEGIN, end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="file with the markers")
    page = parser.parse_args().page
    try:
        before, after = around_the_table(page)  # a wrong page shows before minutes have gone
    except ValueError as error:
        parser.error(f"--page: {error}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    measured = []
    for row in rows(on_gpu):
        print(row.shape, row.dtype, *(f"{error:.1e}" for error in row.fused), flush=True)
        measured.append(row)
    aside = page.with_name(f"{page.name}.part")
    aside.write_text(f"{before}\n\n{table(measured, on_gpu)}\n\n{after}")
    os.replace(aside, page)


if __name__ == "__main__":
    main()
