"""Tiles of the axis kernels: the table, and what is taken from it."""

from typing import NamedTuple

import torch
import triton


class AxisRow(NamedTuple):
    """A row of ``AXIS_TABLE``: what it is for, then the tile."""

    archs: tuple[int, ...] | None  # ten times the compute capability; None: every chip
    forward: bool | None  # None: either pass
    itemsize: int  # of the type, in bytes
    positions: int
    columns: int  # of a tile: each is a channel of a line
    num_warps: int
    programs: int  # at most; a constant, so that the order of sums does not depend on the chip
    registers: int | None = None  # of a thread, at most


# The first row that applies is taken; without one, the axis is left to PyTorch's products. Tiles
# are small, so that 3 to 8 programs run on an SM at a time, which hides the latency of loads.
AXIS_TABLE = [
    # chips      forward bytes positions columns warps programs registers
    AxisRow(None, True, 2, 16, 128, 4, 528),
    AxisRow(None, True, 2, 32, 64, 4, 528),
    AxisRow(None, True, 2, 64, 64, 4, 528),
    AxisRow((90, 100), None, 2, 64, 64, 4, 396, 168),
    AxisRow((90, 100), None, 2, 128, 32, 8, 264),
    AxisRow(None, None, 2, 16, 128, 2, 792),
    AxisRow(None, None, 2, 32, 64, 2, 528),
    AxisRow(None, None, 2, 64, 32, 4, 528),
    AxisRow(None, None, 2, 128, 16, 8, 264),
    AxisRow(None, None, 4, 16, 64, 2, 792),
    AxisRow(None, True, 4, 32, 32, 2, 660),
    AxisRow(None, None, 4, 32, 16, 2, 792),  # one of 32 columns spills in its loop (float32, IEEE)
    AxisRow((100,), None, 4, 64, 16, 8, 264, 255),
    AxisRow(None, None, 4, 64, 16, 8, 264),
    AxisRow(None, None, 8, 16, 32, 2, 792),
    AxisRow(None, None, 8, 32, 16, 4, 660),
    AxisRow(None, True, 8, 64, 16, 8, 264),  # the backward would spill in its loop
]


def axis_row(size: int, dtype: torch.dtype, arch: int, forward: bool) -> AxisRow | None:
    """The first row that applies to an axis of this size."""
    kind = (dtype.itemsize, max(16, triton.next_power_of_2(size)))
    for row in AXIS_TABLE:
        here = row.forward in (forward, None) and (row.archs is None or arch in row.archs)
        if here and (row.itemsize, row.positions) == kind:
            return row
    return None
