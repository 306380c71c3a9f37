"""The numerics table: what is measured, where it is written, and that it cannot compare in vain."""

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks import numerics
from benchmarks.shapes import DTYPES, STAGES, Shape
from smlp_kernels import functional

SMALL = Shape("small-7", 2, 3, 5, 4)
NEEDS_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter")
UNIT_ROUNDOFF = {"fp16": 2.0**-11, "fp32": 2.0**-24}


@NEEDS_CPU
@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_errors_are_those_of_the_type(dtype: str) -> None:
    row = numerics.measure(SMALL, dtype, "cpu")
    for error in (*row.fused, *row.plain):
        assert UNIT_ROUNDOFF[dtype] / 20 < error < 20 * UNIT_ROUNDOFF[dtype]
    assert row.fused != row.plain  # not the same path twice


@NEEDS_CPU
def test_a_block_that_falls_back_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")
    with pytest.raises(RuntimeError, match=r"do not run for small-7.*SMLP_KERNELS_DISABLE=1"):
        numerics.measure(SMALL, "fp32", "cpu")


@NEEDS_CPU
def test_a_wrong_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = functional.ops.differentiable_mix

    def wrong(x: torch.Tensor, *weights: object, plain: bool) -> torch.Tensor:
        return mix(x, *weights, plain=plain) + 0.01 * x[:1]

    monkeypatch.setattr(functional.ops, "differentiable_mix", wrong)
    row = numerics.measure(SMALL, "fp32", "cpu")
    assert row.fused[0] > 1e-4 > row.plain[0]
    assert row.fused[1] > 1e-4 > row.plain[1]


@NEEDS_CPU
def test_the_output_and_the_gradient_of_x_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = functional.ops.differentiable_mix

    def wrong(x: torch.Tensor, *weights: object, plain: bool) -> torch.Tensor:
        return mix(x, *weights, plain=plain) + 0.01 * (x - x.detach())

    monkeypatch.setattr(functional.ops, "differentiable_mix", wrong)
    row = numerics.measure(SMALL, "fp32", "cpu")
    assert row.fused[1] > 1e-4 > row.fused[0]


def test_shapes() -> None:
    assert [s.name for s in numerics.measured_shapes(True)] == [s.name for s in STAGES]
    for stage, small in zip(STAGES, numerics.measured_shapes(False), strict=True):
        assert (small.batch, small.height, small.width) == (1, stage.height, stage.width)
        assert small.channels == stage.channels


def test_table_is_written_between_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{numerics.BEGIN}\nold\n{numerics.END}\nafter\n")
    row = numerics.Errors(SMALL, "fp16", (1e-4, 2e-4, 3e-4), (4e-4, 5e-4, 6e-4))
    monkeypatch.setattr(numerics, "rows", lambda on_gpu: iter([row]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["numerics", "--page", str(page)])
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main unsets it: restore it afterwards
    numerics.main()
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    expected = "small-7 2, 3, 5, 4 fp16 1.0e-04 4.0e-04 2.0e-04 5.0e-04 3.0e-04 6.0e-04"
    assert expected in [" ".join(line.replace("|", " ").split()) for line in lines]
    (header,) = [line for line in lines if "Reproduce" in line]
    assert header.startswith("Executed PTX for sm_90 on a CPU, commit ")
    assert f"torch {torch.__version__}" in header and "triton 3." in header
    numerics.main()  # again, over its own
    assert page.read_text().splitlines() == lines


def test_another_page_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.delattr(numerics, "rows")  # so that measuring would fail
    for text in ("nothing here", f"{numerics.END} then {numerics.BEGIN}", numerics.BEGIN):
        page.write_text(text)
        with pytest.raises(ValueError, match="expected the marker"):
            numerics.around_the_table(page)
    for wrong in (page, tmp_path, tmp_path / "absent.md"):
        monkeypatch.setattr("sys.argv", ["numerics", "--page", str(wrong)])
        with pytest.raises(SystemExit, match="2"):
            numerics.main()
        error = capsys.readouterr().err
        assert "--page: " in error and str(wrong) in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md"]


def test_the_page_itself() -> None:
    """Its table covers all stages in every type."""
    text = numerics.PAGE.read_text().partition(numerics.BEGIN)[2].partition(numerics.END)[0]
    lines = [line.split(" | ") for line in text.splitlines()]
    found = {(line[0].strip("| "), line[2].strip()) for line in lines if len(line) == 9}
    assert found >= set(itertools.product((stage.name for stage in STAGES), DTYPES))
    assert "Reproduce: `python -m benchmarks.numerics`" in text
