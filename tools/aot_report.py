"""Compile the shipped kernels for every chip, without one, and list what they need.

    python -m tools.aot_report

One row per kernel, shape, type and chip: registers, spills, shared memory, how often loops access
it, and matrix instructions. Exits with 1 if a row must not be shipped (see
:meth:`tools.aot.Resources.problems`).
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from smlp.testing import PRECISIONS
from smlp_kernels.kernels.axis import axes_kernel
from smlp_kernels.kernels.backward import Needed, mix_backward
from smlp_kernels.kernels.mix import mix
from smlp_kernels.kernels.narrow import narrow_kernel
from smlp_kernels.kernels.rows import copy_images_kernel
from smlp_kernels.kernels.weight_sums import weight_sums_kernel
from smlp_kernels.launch import Call
from smlp_kernels.weights import Weights
from tools import aot

SIZES = (56, 28, 14, 7)
WIDTHS = {"tiny": (80, 160, 320, 640), "small": (96, 192, 384, 768), "base": (112, 224, 448, 896)}
STAGES = [
    (size, size, width)
    for widths in WIDTHS.values()
    for size, width in zip(SIZES, widths, strict=True)
]
SEED_DEMO = (224, 224, 3)
LARGEST = (256, 256, 2048)  # of what the kernels take: every loop, the largest blocks
OTHERS = [(1, 16, 64), (32, 128, 48), (8, 32, 192), (4, 4, 128), (7, 7, 2048), (256, 256, 16)]
IN_FULL = (86, 90)  # a small and a large chip: all cases and all kernels on these
MATRIX = ("HGMMA", "UTCHMMA", "HMMA", "DMMA")  # Hopper's and Blackwell's fast ones first
BATCH = 128


@dataclass(frozen=True)
class Case:
    """One row: a block's size, a type, a layout and a chip; all kernels of the block."""

    height: int
    width: int
    channels: int
    dtype: str  # of PRECISIONS
    channels_last: bool
    arch: int

    def calls(self) -> dict[str, Call]:
        """Every call of a training step of the block, on tensors without memory."""
        dtype, products, _ = PRECISIONS[self.dtype]
        torch.backends.cuda.matmul.fp32_precision = products
        h, w, c = self.height, self.width, self.channels

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, device="meta", dtype=dtype)

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = empty(BATCH, c, h, w).contiguous(memory_format=layout)
        weights = Weights(empty(h, h), empty(h), empty(w, w), empty(w), empty(c, 3 * c), empty(c))
        forward: list[Call] = []
        backward: list[Call] = []
        mix(x, weights, self.arch, forward.append)
        mix_backward(x, x, weights, Needed(*[True] * 4), self.arch, backward.append)
        return {
            **{f"forward, {name_of(call)}": call for call in forward},
            **{f"backward, {name_of(call)}": call for call in backward},
        }


def name_of(call: Call) -> str:
    """Of what a call does."""
    if call.plan.kernel in (axes_kernel, narrow_kernel):
        narrow = "narrow " if call.plan.kernel is narrow_kernel else ""
        along = {True: "along H", False: "along W", None: "axes"}
        return narrow + along[call.plan.constants["ALONG_H"]]
    return {copy_images_kernel: "layout", weight_sums_kernel: "sums"}[call.plan.kernel]


def shipped_cases(
    archs: Sequence[int] = tuple(aot.SHARED_MEMORY), *, quick: bool = False
) -> list[Case]:
    """Every stage shape on Hopper, one of each size elsewhere, other types, layouts and sizes.

    Args:
        archs: ten times the compute capability of each chip.
        quick: one shape of each kind only.
    """
    cases: list[Case] = []
    for arch in archs:
        large, small = STAGES[0], STAGES[3]
        cases += [Case(*shape, "bf16", True, arch) for shape in (large, small)]
        cases += [Case(*large, "tf32", True, arch), Case(*small, "fp32", True, arch)]
        if quick:
            continue
        stages = STAGES if arch == 90 else STAGES[:4]
        others = OTHERS if arch in IN_FULL else []
        cases += [Case(*shape, "bf16", True, arch) for shape in (*stages[1:3], *stages[4:])]
        cases += [Case(*shape, "bf16", False, arch) for shape in STAGES[:4]]
        cases += [Case(*large, name, True, arch) for name in ("fp16", "fp32", "fp64")]
        cases += [Case(*large, "tf32", False, arch), Case(*STAGES[1], "fp32", True, arch)]
        cases += [
            Case(*LARGEST, name, channels_last, arch)
            for name in ("bf16", "tf32", "fp32", "fp64")
            for channels_last in (True, False)
        ]
        cases += [Case(*shape, "bf16", True, arch) for shape in others]
        cases += [Case(*SEED_DEMO, "fp32", False, arch)] if arch in IN_FULL else []
    return cases


def rows_of(case: Case) -> list[dict]:
    """Compile every kernel of a case; a row each."""
    logging.disable(logging.WARNING)
    rows: list[dict] = []
    for name, call in case.calls().items():
        resources = aot.compile_call(call, case.arch)
        rows.append(
            {
                "kernel": name,
                **asdict(case),
                "registers": resources.registers,
                "spills": resources.spills,
                "loop_spills": resources.loop_spills,
                "loop_stores": resources.loop_stores,
                "loop_loads": resources.loop_loads,
                "shared": resources.shared,
                "tensor_memory": resources.tensor_memory,
                "serialized": resources.serialized,
                "matrix": {
                    k: resources.instructions[k] for k in MATRIX if k in resources.instructions
                },
                "instructions": sum(resources.instructions.values()),
                "warps": call.plan.num_warps,
                "programs": call.plan.programs,
                "problems": resources.problems(case.arch),
            }
        )
    return rows


def compile_cases(cases: Sequence[Case]) -> Iterator[dict]:
    """Rows of all cases in order, compiled on all cores."""
    with ProcessPoolExecutor() as pool:
        for rows in pool.map(rows_of, cases):
            yield from rows


def cells_of(row: dict) -> dict[str, str]:
    """A row as a person reads it, by column."""
    matrix = " ".join(f"{name} {count}" for name, count in row["matrix"].items())
    return {
        "chip": f"sm_{row['arch']}",
        "block": f"{row['height']}x{row['width']} C {row['channels']}",
        "type": row["dtype"],
        "layout": "NHWC" if row["channels_last"] else "NCHW",
        "kernel": row["kernel"],
        "registers": str(row["registers"]),
        "spilled, in loops": f"{row['spills']} B, {row['loop_spills']}",
        "shared memory": f"{row['shared'] / 1024:.0f} KiB",
        "its stores, loads in loops": f"{row['loop_stores']}, {row['loop_loads']}",
        "matrix instructions": matrix or "none",
        "problems": "; ".join(row["problems"]),
    }


COLUMNS = (6, 14, 8, 6, 20, 9, 17, 13, 26, 19, 0)  # of plain lines


def line_of(cells: Iterable[str]) -> str:
    """Cells in columns of a fixed width."""
    columns = zip(cells, COLUMNS, strict=True)
    return "  ".join(cell.ljust(width) for cell, width in columns).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    text = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m tools.aot_report", description=text)
    text = "compute capabilities, times ten; default all"
    known = list(aot.SHARED_MEMORY)
    parser.add_argument("--arch", type=int, nargs="+", choices=known, help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--quick", action="store_true", help="only one shape of each kind")
    options = parser.parse_args(arguments)
    rows: list[dict] = []
    archs = options.arch or tuple(aot.SHARED_MEMORY)
    for row in compile_cases(shipped_cases(archs, quick=options.quick)):
        cells = cells_of(row)
        if not rows:
            print(line_of(cells))
        rows.append(row)
        print(line_of(cells.values()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"\n{len(rows)} kernels, {bad} of them not to be shipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
