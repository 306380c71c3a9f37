"""The table's numbers against hand arithmetic on an invented run, and the refusal of rehearsals."""

import json
from pathlib import Path

import pytest

from benchmarks.plot import NothingMeasuredError, load, markdown, write

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


def test_table(source: Path) -> None:
    text = markdown(load(source), "a command")
    lines = text.splitlines()
    assert "Measured by `a command`; commit abc; ceilings measured on invented" in lines[0]
    table = [line for line in lines if line.startswith(("| tiny", "| base"))]
    assert table == [
        "| tiny-56 [1, 2, 3, 4] | 40.0 | 80.0 | 50% | 200.0 (compiled) | 2.50x |",
        "| base-14 [1, 2, 3, 4] | 30.0 | 120.0 | 25% | 120.0 (eager_nchw) | 1.00x |",
    ]
    # sqrt(0.5 * 0.25) = 0.354, sqrt(2.5 * 1) = 1.58
    assert "share of floor 35% (worst 25%), over best torch 1.58x (worst 1.00x)" in text


def test_missing_providers_leave_dashes(source: Path) -> None:
    run = load(source)
    run.rows[:] = [row for row in run.rows if row["provider"] != "fused"]
    assert "| 40.0 | - | - | 200.0 (compiled) | - |" in markdown(run, "a command")
    run.rows[:] = [_row("tiny-56", "fused", 80.0)]
    assert "| 40.0 | 80.0 | 50% | - | - |" in markdown(run, "a command")


def test_both_files_are_written(source: Path, tmp_path: Path) -> None:
    picture, table = write(source, tmp_path / "out", "a command")
    assert picture.read_bytes().startswith(b"\x89PNG") and table.read_text().startswith("Measured")


def test_a_rehearsal_is_refused(source: Path) -> None:
    data = json.loads(source.read_text()) | {"ceilings": None}
    source.write_text(json.dumps(data))
    with pytest.raises(NothingMeasuredError, match="nothing to plot"):
        load(source)


def test_foreign_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a JSON of pytest benchmarks or of gpu_report"):
        load(path)
