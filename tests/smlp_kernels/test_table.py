"""Rows that a user adds to the table of tiles."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from smlp.block import smlp
from smlp.testing import EPS, assert_close, formula, to_float64
from smlp_kernels import fused_smlp, launch
from smlp_kernels.kernels.axis import FORWARD, axes_kernel, split_batch
from smlp_kernels.kernels.tiles import AXIS_TABLE, axis_row
from smlp_kernels.table import AxisRow, add_row, set_rows
from tests.smlp_kernels.oracle import Case

CASE = Case(3, 7, 9, 20)
GOOD = AxisRow((90, 103), None, 2, 64, 32, 4, 300, 128)


@pytest.fixture(autouse=True)
def shipped() -> Iterator[list[AxisRow]]:
    """The table is put back after each test."""
    rows = list(AXIS_TABLE)
    yield rows
    set_rows(rows)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("archs", 90, r"row.archs: expected None or a tuple such as \(90,\), got 90"),
        ("archs", ("sm_90",), r"row.archs: expected None or a tuple .*, got \('sm_90',\)"),
        ("archs", (9.0,), r"row.archs: expected None or a tuple .*, got \(9.0,\)"),
        ("forward", "both", r"row.forward: expected None, True or False, got 'both'"),
        ("itemsize", 16, r"row.itemsize: expected 2, 4 or 8, got 16"),
        ("positions", 56, r"row.positions: expected a power of two from 16 to 256, got 56"),
        ("columns", 48, r"row.columns: expected a power of two from 16 to 2\*\*16, got 48"),
        ("columns", 64.0, r"row.columns: expected a power of two from 16 to .*, got 64.0"),
        ("num_warps", 6, r"row.num_warps: expected a power of two up to 32, got 6"),
        ("programs", 0, r"row.programs: expected at least 1, got 0"),
        ("registers", 256, r"row.registers: expected None or 24 to 255, got 256"),
    ],
)
def test_wrong_rows_are_refused(
    field: str, value: Any, message: str, shipped: list[AxisRow]
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        add_row(GOOD._replace(**{field: value}))
    assert shipped == AXIS_TABLE


def test_only_a_row_is_taken(shipped: list[AxisRow]) -> None:
    with pytest.raises(TypeError, match=r"^row: expected an AxisRow, got \(None, True, 2\)$"):
        add_row((None, True, 2))  # type: ignore[arg-type]
    assert shipped == AXIS_TABLE


def test_shipped_rows_would_be_taken(shipped: list[AxisRow]) -> None:
    for row in shipped:
        add_row(row)
    assert shipped[::-1] + shipped == AXIS_TABLE


def test_an_added_row_comes_first_where_it_applies() -> None:
    def row(arch: int, forward: bool, size: int = 56) -> AxisRow | None:
        return axis_row(size, torch.bfloat16, arch, forward)

    before = {arch: row(arch, True) for arch in (80, 90)}
    assert row(90, True, size=256) is None
    add_row(GOOD)
    assert row(103, True) == row(90, False) == GOOD
    assert row(80, True) == before[80] and row(90, True) != before[90]
    add_row(GOOD._replace(programs=200))
    assert row(90, True) == GOOD._replace(programs=200)
    add_row(GOOD._replace(positions=256))
    assert row(90, True, size=256) is not None


def test_registers_of_both_axes_are_those_of_the_row() -> None:
    add_row(GOOD._replace(positions=16))
    add_row(GOOD._replace(positions=32))
    add_row(GOOD._replace(positions=64, registers=96))

    def plans(height: int, width: int) -> tuple[launch.Plan | bool, ...]:
        shape = torch.Size((2, 80, height, width))
        images, axes = split_batch(shape, FORWARD, (0, 0), torch.bfloat16, "ieee", 90)
        return axes.plans(images, first=True)

    assert [plan.registers for plan in plans(14, 28)] == [128]
    assert [plan.registers for plan in plans(14, 56)] == [128, 96]


@pytest.mark.parametrize(
    "row",
    [
        AxisRow(None, None, 8, 16, 16, 1, 2),
        AxisRow(None, False, 8, 16, 64, 8, 5),
        AxisRow(None, True, 8, 16, 256, 4, 1),
    ],
    ids=str,
)
def test_values_with_an_added_row(row: AxisRow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that has run before is planned again; its values stay right."""
    arguments = CASE.arguments(torch.float64)
    for argument in arguments:
        argument.requires_grad_()
    exact_arguments = to_float64(arguments)
    planned: list[launch.Plan] = []
    run = launch.Call.launch

    def record(call: launch.Call, *arguments: Any) -> None:
        planned.append(call.plan)
        run(call, *arguments)

    monkeypatch.setattr(launch.Call, "launch", record)

    def tiles() -> dict[str, set[int]]:
        """Columns of a tile in the forward's launches, and in the backward's."""
        planned.clear()
        y = fused_smlp(*arguments)
        exact = formula(*exact_arguments)
        assert_close(y, exact, smlp(*arguments), eps=EPS[torch.float64])
        grads = torch.autograd.grad(y.square().sum(), arguments)
        for a, e in zip(
            grads, torch.autograd.grad(exact.square().sum(), exact_arguments), strict=True
        ):
            assert_close(a, e, None, eps=EPS[torch.float64])
        found: dict[str, set[int]] = {"forward": set(), "backward": set()}
        for plan in planned:
            constants = plan.constants
            if plan.kernel is axes_kernel:
                pass_ = "forward" if constants["ALONG_H"] is None else "backward"
                found[pass_] |= {constants["TILE_H"], constants["TILE_W"]}
        return found

    before = tiles()
    add_row(row)
    added = {row.columns}
    assert (
        before
        != tiles()
        == {
            "backward": before["backward"] if row.forward is True else added,
            "forward": before["forward"] if row.forward is False else added,
        }
    )
