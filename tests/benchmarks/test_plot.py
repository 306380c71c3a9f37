"""The table's numbers against hand arithmetic on an invented run, and the refusal of rehearsals."""

import json
from pathlib import Path

import pytest

from benchmarks.plot import write
from benchmarks.report import NothingMeasuredError, load, tables

FLOOR_US = {"tiny-56": 40.0, "base-14": 30.0}
TIMES = {  # microseconds
    "tiny-56": {"eager_nchw": 400.0, "compiled": 200.0, "fused": 80.0},
    "base-14": {"eager_nchw": 120.0, "compiled": 150.0, "fused": 120.0},
}


def _row(shape: str, provider: str, us: float | None) -> dict:
    row = {"pass": "fwd", "dtype": "bf16", "layout": "channels_last", "size": [1, 2, 3, 4]}
    row |= {"shape": shape, "provider": provider, "gpu_us": us, "floor_us": FLOOR_US[shape]}
    return row | {"share_of_floor": us and FLOOR_US[shape] / us}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [_row(shape, *time) for shape in TIMES for time in TIMES[shape].items()]
    run = {
        "benchmarks": [{"extra_info": row} for row in rows],
        "machine_info": {"smlp": {"commit": "abc"}},
        "ceilings": {
            "copy_bytes_per_s": 3e12,
            "gemm_flops_per_s": {"bf16": 8e14},
            "device": "invented",
        },
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    return path


def cells(lines: list[str], start: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(f"| {start}"))
    return [text.strip() for text in line.split("|")[1:-1]]


def test_table(source: Path) -> None:
    report = load(source)
    assert "`a command`: commit abc; ceilings measured on invented" in report.source("a command")
    lines = tables(report.series())
    assert lines[0] == "**fwd, bf16, channels_last** (GPU microseconds)"
    assert len({len(line) for line in lines if line.startswith("|")}) == 1  # columns line up
    head = ["[B, C, H, W]", "eager_nchw", "compiled", "fused", "floor"]
    assert cells(lines, "[B")[:5] == head
    assert [cells(lines, name) for name in ("tiny", "base")] == [
        ["tiny-56 [1, 2, 3, 4]", *["400.0", "200.0", "80.0", "40.0", "50%"], "2.50x (compiled)"],
        ["base-14 [1, 2, 3, 4]", *["120.0", "150.0", "120.0", "30.0", "25%"], "1.00x (eager_nchw)"],
    ]
    # sqrt(0.5 * 0.25) = 0.354, sqrt(2.5 * 1) = 1.58
    assert cells(lines, "geometric")[-2:] == ["35%, 25%", "1.58x, 1.00x"]


def test_only_columns_that_hold_something(source: Path) -> None:
    report = load(source)
    report.rows[:] = [row for row in report.rows if row["provider"] != "fused"]
    lines = tables(report.series())
    assert cells(lines, "[B") == ["[B, C, H, W]", "eager_nchw", "compiled", "floor"]
    assert not any("geometric" in line for line in lines)
    report.rows[:] = [_row("tiny-56", "fused", 80.0) | {"noise": -0.012}]
    lines = tables(report.series())
    assert cells(lines, "tiny") == ["tiny-56 [1, 2, 3, 4]", "80.0", "40.0", "50%"]
    assert lines[0].endswith("(GPU microseconds; measured twice, one provider differs by 1.2%)")
    report.rows.append(_row("base-14", "eager_nchw", 9.0))
    assert cells(tables(report.series()), "base")[1:] == ["9.0", "-", "30.0", "-"]


def test_both_files_are_written(source: Path, tmp_path: Path) -> None:
    picture, table = write(source, tmp_path / "out")
    assert picture.read_bytes().startswith(b"\x89PNG") and table.read_text().startswith("Measured")


def test_a_rehearsal_is_refused(source: Path) -> None:
    data = json.loads(source.read_text()) | {"ceilings": None}
    source.write_text(json.dumps(data))
    with pytest.raises(NothingMeasuredError, match="nothing to plot"):
        load(source)


def test_foreign_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected the JSON of pytest benchmarks"):
        load(path)
