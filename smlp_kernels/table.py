"""Adding rows to the table of tiles, for chips that have none."""

from collections.abc import Sequence

from smlp_kernels.kernels.backward import backward_plan
from smlp_kernels.kernels.mix import mix_plan
from smlp_kernels.kernels.tiles import AXIS_TABLE, AxisRow

ALLOWED = {
    "forward": ("None, True or False", (None, True, False)),
    "itemsize": ("2, 4 or 8", (2, 4, 8)),
    "positions": ("a power of two from 16 to 256", (16, 32, 64, 128, 256)),
    "columns": ("a power of two from 16 to 2**16", [2**n for n in range(4, 17)]),
    "num_warps": ("a power of two up to 32", (1, 2, 4, 8, 16, 32)),
    "programs": ("at least 1", range(1, 2**31)),
    "registers": ("None or 24 to 255", (None, *range(24, 256))),
}


def add_row(row: AxisRow) -> None:
    """Put a row before the others, so that it is taken wherever it applies, from the next call on.

    ``python -m tools.tune`` finds rows. All processes of a distributed run need the same ones, as
    they decide the order of sums. A tile too large for the chip's shared memory fails to launch.

    Raises:
        TypeError: if it is not an ``AxisRow``.
        ValueError: if a field has a value that no kernel can be compiled with.
    """
    if not isinstance(row, AxisRow):
        raise TypeError(f"row: expected an AxisRow, got {row!r}")
    archs = row.archs
    if archs is not None and not (isinstance(archs, tuple) and set(archs) <= set(range(80, 1000))):
        raise ValueError(f"row.archs: expected None or a tuple such as (90,), got {archs!r}")
    for name, (expected, allowed) in ALLOWED.items():
        value = getattr(row, name)
        if value not in allowed or isinstance(value, float):
            raise ValueError(f"row.{name}: expected {expected}, got {value!r}")
    set_rows([row, *AXIS_TABLE])


def set_rows(rows: Sequence[AxisRow]) -> None:
    """Replace the table, and forget plans that were made with the old one."""
    AXIS_TABLE[:] = rows
    for cached in (mix_plan, backward_plan):
        cached.cache_clear()
