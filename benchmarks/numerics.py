"""Measure errors against float64 and write them into docs/numerics.md.

``python -m benchmarks.numerics`` takes every stage shape and type, forward and backward, the fused
block next to PyTorch's own operators at the same precision. Without a GPU the compiled kernels are
executed on the CPU: see tests/ptx/README.md.
"""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import ROOT, describe
from benchmarks.roofline import matmul_precision
from benchmarks.shapes import DTYPES, STAGES, Shape
from smlp import SMLPBlock
from smlp.block import smlp
from smlp.files import write_atomically
from smlp.machine import in_words
from smlp.tables import markdown_table
from smlp.testing import PRECISIONS, compare_block

PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- begin: python -m benchmarks.numerics -->", "<!-- end -->"
FACTS = ("commit", "torch", "triton", "driver_version", "cuda")
GPU_BATCH = 8
EXECUTED_ARCH = 90  # compute capability, times ten, that is compiled for without a GPU
COLUMNS = ("output", "d x", "d weights")


class Errors(NamedTuple):
    """Relative errors of one shape and type; the weights' is the largest of their gradients'."""

    shape: Shape
    dtype: str
    fused: tuple[float, float, float]  # as COLUMNS
    plain: tuple[float, float, float]


def measured_shapes(on_gpu: bool) -> list[Shape]:
    """The stages as they are but for the batch."""
    batch = GPU_BATCH if on_gpu else 1
    return [replace(shape, batch=batch) for shape in STAGES]


def measure(shape: Shape, dtype: str, device: str) -> Errors:
    """Errors of the fused block and of PyTorch's on the same, already rounded numbers.

    Raises:
        RuntimeError: if the fused block would run on PyTorch, which would be compared with itself.
    """
    from smlp_kernels import FusedSMLPBlock, fallback_reason  # once TRITON_INTERPRET is settled

    torch.manual_seed(0)
    size = (shape.height, shape.width, shape.channels)
    plain = SMLPBlock(*size, device=device, dtype=DTYPES[dtype])
    fused = FusedSMLPBlock(*size, device=device, dtype=DTYPES[dtype])
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(shape.size, device=device) + 0.25
    x = x.to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn_like(x)
    if reason := fallback_reason(x):
        raise RuntimeError(f"the kernels do not run for {shape} in {dtype}: {reason}")
    arguments, eps = [x, *fused.weights()], PRECISIONS[dtype].eps
    with matmul_precision(dtype):
        results = compare_block(
            lambda x, *_: fused(x), arguments, dy, eps=eps, peer=peer(dtype, device)
        )
    of_both = zip(*((r.error, r.peer_error or 0.0) for r in results), strict=True)
    return Errors(shape, dtype, *((y, x, max(weights)) for y, x, *weights in of_both))


def peer(dtype: str, device: str) -> Callable[..., Tensor]:
    """PyTorch's block; a CPU has no TF32, so that its operands are cut off there."""
    if dtype != "tf32" or device == "cuda":
        return smlp
    from tests.ptx.blocks import tf32_formula

    return tf32_formula


def rows(on_gpu: bool) -> Iterator[Errors]:
    """Every shape in every type; compiled kernels that are executed may do nothing wrong."""
    if not on_gpu:
        from tests.ptx.blocks import checked
    for dtype in DTYPES:
        for shape in measured_shapes(on_gpu):
            with contextlib.nullcontext() if on_gpu else checked(EXECUTED_ARCH):
                row = measure(shape, dtype, "cuda" if on_gpu else "cpu")
            yield row


def table(measured: list[Errors], on_gpu: bool) -> str:
    """Markdown: what it was measured on, then one line per row."""
    facts = describe()
    device = facts["gpu"] if on_gpu else f"Executed PTX for sm_{EXECUTED_ARCH} on a CPU"
    versions = in_words(facts, FACTS)
    head = [f"{device}, {versions}. Reproduce: `python -m benchmarks.numerics`.", ""]
    if not on_gpu:
        head += [
            "Batch 1. Without a GPU the kernels are executed as compiled (`tests/ptx/README.md`): "
            "operands as in tensor cores, sums in float32, one product after the other; a GPU's "
            "last bits differ. PyTorch's columns are its CPU code, and so are the fused block's "
            "products over channels (cuBLAS on a GPU), which sum float32 in blocks. For TF32, the "
            "operands of the CPU code are cut off as in a tensor core.",
            "",
        ]
    columns = (f"{column}, {who}" for column in COLUMNS for who in ("fused", "PyTorch"))
    lines = []
    for row in measured:
        pairs = zip(row.fused, row.plain, strict=True)
        errors = (f"{value:.1e}" for pair in pairs for value in pair)
        lines.append((row.shape.name, str(row.shape.size)[1:-1], row.dtype, *errors))
    return "\n".join([*head, *markdown_table(("stage", "B, C, H, W", "type", *columns), lines)])


def around_the_table(page: Path) -> tuple[str, str]:
    """Return the text before and after the table in ``page``, the markers included.

    Raises:
        OSError: if the page cannot be read and written.
        ValueError: if the markers are not in it.
    """
    with page.open("r+") as file:
        text = file.read()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if text.count(BEGIN) != 1 or not end:
        raise ValueError(f"{page}: expected the marker {BEGIN} once, and {END} after it")
    return before + BEGIN, end + after


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.numerics", None, __doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="file with the markers")
    page = parser.parse_args().page
    try:
        before, after = around_the_table(page)  # a wrong page shows before minutes have gone
    except (OSError, ValueError) as error:
        parser.error(f"--page: {error}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported
    measured = []
    for row in rows(on_gpu):
        print(row.shape, row.dtype, *(f"{error:.1e}" for error in row.fused), flush=True)
        measured.append(row)
    write_atomically(page, f"{before}\n\n{table(measured, on_gpu)}\n\n{after}".encode())


if __name__ == "__main__":
    main()
