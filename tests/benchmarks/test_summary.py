"""Ratios, means and the printed table, against numbers worked out by hand."""

import pytest

from benchmarks.summary import best_torch, geometric_mean, speedups, summary_lines

GPU_US = {"eager_nchw": 300.0, "compiled": 150.0, "fused": 60.0}


def test_speedups_say_how_much_longer_the_others_take() -> None:
    assert speedups(GPU_US, "fused") == {"eager_nchw": 5.0, "compiled": 2.5}


def test_best_torch_leaves_the_fused_block_out() -> None:
    assert best_torch(GPU_US) == ("compiled", 150.0)
    assert best_torch({"fused": 1.0}) is None


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    for bad in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="values: expected at least one, all positive"):
            geometric_mean(bad)


def test_table_has_a_section_per_group_and_dashes_for_what_was_not_measured() -> None:
    rows = [
        {"group": "fwd a", "provider": "eager_nchw", "gpu_us": 123.456, "share_of_floor": 0.25},
        {"group": "fwd a", "provider": "fused", "gpu_us": 61.7, "noise": -0.012},
        {"group": "bwd a", "provider": "fused"},
    ]
    lines = summary_lines(rows)
    assert [line for line in lines if line in ("fwd a", "bwd a")] == ["fwd a", "bwd a"]
    assert lines[3].split()[:3] == ["eager_nchw", "123.5", "25%"]
    assert lines[4].split()[4] == "-1.2%"
    assert set(lines[-1].split()[1:]) == {"-"}
    assert len({len(line) for line in lines[2:5]}) == 1  # columns line up
