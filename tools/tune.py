"""Find the fastest tiles for this GPU and print them as rows for the table.

    python -m tools.tune --shape 128,96,56,56

For each pass, and each length of the block's axes, candidate rows are put first in the table in
turn; the pass is then checked and timed as ``pytest benchmarks`` does it. Tiles are tried first,
with as many programs as the table's row has, then numbers of programs. A kernel that must not be
shipped, such as one that spills in its loop, is not timed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton

from benchmarks.providers import PROVIDERS
from benchmarks.shapes import DTYPES, Shape
from benchmarks.workbench import open_workbench
from smlp_kernels import ops
from smlp_kernels.functional import MAX_CHANNELS, MAX_SIZE
from smlp_kernels.kernels import narrow
from smlp_kernels.kernels.axis import axes_kernel
from smlp_kernels.kernels.tiles import AXIS_TABLE, AxisRow, axis_row
from smlp_kernels.table import add_row, set_rows
from tools import aot
from tools.aot_report import Case

TILE_BYTES = (2048, 4096, 8192, 16384)
WARPS = (2, 4, 8)
REGISTERS = (None, 168, 128)  # with fewer for a thread, more programs run on an SM
PROGRAMS = (2, 3, 4, 5, 6, 8)  # for each SM
LEAST_GAIN = 0.02  # of the time: less may be noise
# With any of these, blocks do not run on the kernels, or not on the GPU.
OTHER_WAYS = ("TRITON_INTERPRET", "SMLP_KERNELS_DISABLE")


class Search(NamedTuple):
    """What rows are looked for."""

    shape: Shape
    dtype: str  # of DTYPES
    arch: int  # ten times the compute capability
    forward: bool

    @property
    def name(self) -> str:
        """Of the pass."""
        return "forward" if self.forward else "backward"

    def problems(self) -> list[str]:
        """Why what the table now leads to must not be shipped."""
        size = (self.shape.height, self.shape.width, self.shape.channels)
        calls = Case(*size, self.dtype, True, self.arch).calls()
        return [
            problem
            for name, call in calls.items()
            if name.startswith(self.name) and call.plan.kernel is axes_kernel
            for problem in aot.compile_call(call, self.arch).problems(self.arch)
        ]

    def microseconds(self, row: AxisRow | None) -> float:
        """GPU time of the pass with a row before all others; infinite if that is no good."""
        rows = list(AXIS_TABLE)
        if row is not None:
            add_row(row)
        us = torch.inf
        try:
            problems = self.problems()
            if not problems:
                pass_, fused = "inference" if self.forward else "bwd", [PROVIDERS["fused"]]
                with open_workbench(self.shape, self.dtype, "channels_last", pass_, fused) as bench:
                    try:
                        bench.steps("fused")
                        us = bench.gpu_us["fused"].median
                    except Exception as error:  # as of a kernel that the GPU refuses
                        problems = [f"{type(error).__name__}: {error}"]
        finally:
            set_rows(rows)
        found = "; ".join(problems) or f"{us:.1f} us"
        print(f"{self.name:8}  {row or 'the table as it is'}: {found}", flush=True)
        return us

    def fastest(self, positions: int, sms: int) -> tuple[AxisRow, float]:
        """The best row for axes of so many positions, and its microseconds."""
        dtype = DTYPES[self.dtype]
        start = axis_row(positions, dtype, self.arch, self.forward)
        if start is None:  # these axes are left to PyTorch's products
            start = AxisRow(None, None, dtype.itemsize, positions, 16, 8, 2 * sms)
        start = start._replace(archs=(self.arch,), forward=self.forward)
        times: dict[AxisRow, float] = {}

        def best_of(candidates: Iterator[AxisRow]) -> AxisRow:
            for row in candidates:
                if row not in times:
                    times[row] = self.microseconds(row)
            return min(times, key=times.__getitem__)

        best = best_of(programs(best_of(tiles(start)), sms))
        return best, times[best]


def tiles(row: AxisRow) -> Iterator[AxisRow]:
    """All tiles for what a row is for."""
    for tile_bytes in TILE_BYTES:
        columns = tile_bytes // row.itemsize // row.positions
        if columns >= 16:
            for warps in WARPS:
                for registers in REGISTERS:
                    yield row._replace(columns=columns, num_warps=warps, registers=registers)


def programs(row: AxisRow, sms: int) -> Iterator[AxisRow]:
    """A row with each number of programs."""
    for count in PROGRAMS:
        yield row._replace(programs=count * sms)


def shape_of(text: str) -> Shape:
    """Of "128,96,56,56"."""
    try:
        batch, channels, height, width = map(int, text.split(","))
        shape = Shape(text, batch, channels, height, width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected BATCH,C,H,W, got {text!r}: {error}") from error
    if max(height, width) > MAX_SIZE or channels > MAX_CHANNELS:
        limits = f"H and W up to {MAX_SIZE}, C up to {MAX_CHANNELS}"
        raise argparse.ArgumentTypeError(f"expected {limits}, got {text!r}")
    return shape


def main(arguments: Sequence[str] | None = None) -> int:
    text = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser("python -m tools.tune", description=text)
    parser.add_argument("--shape", type=shape_of, required=True, metavar="BATCH,C,H,W")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tiles are timed: an NVIDIA GPU is needed")
    if found := [name for name in OTHER_WAYS if os.environ.get(name) == "1"]:
        parser.error(f"{found[0]}: expected not to be set, got 1")
    gpu = torch.cuda.get_device_properties()
    arch = 10 * gpu.major + gpu.minor
    if arch not in aot.SHARED_MEMORY:
        parser.error(f"compute capability {arch / 10}: add it to SHARED_MEMORY in tools/aot.py")
    ops.run_hopper = None  # its tiles are not in the table
    narrow.ARCHS = ()  # nor these
    sizes = (options.shape.height, options.shape.width)
    faster = []
    for forward in (True, False):
        search = Search(options.shape, options.dtype, arch, forward)
        for positions in sorted({max(16, triton.next_power_of_2(size)) for size in sizes}):
            before = search.microseconds(None)
            row, us = search.fastest(positions, gpu.multi_processor_count)
            if us < (1 - LEAST_GAIN) * before:
                add_row(row)  # for the searches that follow
                faster.append(
                    f"AxisRow{tuple(row)},  # {search.name}: {us:.1f} us for {before:.1f}"
                )
    name = f"{options.shape}, {options.dtype}, {gpu.name}, Triton {triton.__version__}"
    print(f"\n{name}:", *(faster or ["no row is faster than those of the table"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
