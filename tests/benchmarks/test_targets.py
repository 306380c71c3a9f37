"""Verdicts on invented numbers, worked out by hand; what is missing is neither pass nor miss."""

import pytest

from benchmarks.shapes import GROWTH, STAGES
from benchmarks.targets import Target, table, verdicts


def _row(shape: str, share: float, ratio: float, **other: object) -> dict:
    row = {"provider": "fused", "pass": "inference", "dtype": "bf16", "layout": "channels_last"}
    row |= {"shape": shape, "share_of_floor": share, "over_best_torch": ratio}
    return row | {"speedup_over": {"compiled": ratio}} | other


def _nothing(_: str) -> None:
    return None


def _named(judged: list[Target], start: str) -> Target:
    (found,) = (one for one in judged if one.name.startswith(start))
    return found


def test_nothing_measured_is_no_verdict() -> None:
    judged = verdicts([], _nothing)
    assert {one.passed for one in judged} == {None}
    assert len({one.name for one in judged}) == len(judged) == 22


def test_means_and_worst_of_the_stages() -> None:
    rows = [_row(shape.name, 0.5, 2.0) for shape in STAGES]
    rows[3] |= {"share_of_floor": 0.25, "over_best_torch": 1.2}
    rows.append({**rows[0], "provider": "compiled", "share_of_floor": 0.01})
    judged = verdicts(rows, _nothing)
    mean = _named(judged, "forward, share of floor: geometric mean")
    assert mean.value == pytest.approx(0.5 * 0.5 ** (1 / 12)) and mean.passed and not mean.remark
    worst = _named(judged, "forward, share of floor: worst")
    assert (worst.value, worst.passed, worst.remark) == (0.25, False, STAGES[3].name)
    assert _named(judged, "forward over best torch: worst").passed  # 1.2 of 1.1
    assert _named(judged, "fwd+bwd, share of floor: worst").passed is None
    assert _named(judged, "forward over best torch, tf32").passed is None


def test_incomplete_measurements_are_told() -> None:
    rows = [_row("small-14", 0.5, 2.0, speedup_over={"eager_nhwc": 2.0}, dtype="tf32")]
    remark = _named(verdicts(rows, _nothing), "forward over best torch, tf32").remark
    assert remark == "1 of 12 shapes; without torch.compile on 1 of 1"


def test_layout_and_demo_have_their_own_rows() -> None:
    rows = [_row(shape.name, 0.5, 1.6, layout="nchw") for shape in STAGES]
    rows.append(_row("demo-224", 0.5, 1.6, layout="nchw", dtype="fp32"))
    judged = verdicts(rows, _nothing)
    assert _named(judged, "forward over best torch, nchw").passed is False
    assert _named(judged, "forward over best torch, demo-224").passed is True


def test_growth_is_of_the_share() -> None:
    shares = dict(zip((14, 28, 56, 112, 224), (0.6, 0.5, 0.5, 0.3, 0.45), strict=True))
    rows = [_row(shape.name, shares[shape.height], 1.0) for shape in GROWTH]
    grown = _named(verdicts(rows, _nothing), "growth")
    assert (grown.value, grown.passed) == (pytest.approx(2.0), False)
    assert grown.remark == "from 14 to 112"
    assert _named(verdicts(rows[:-1], _nothing), "growth").passed is None


def test_other_measurements() -> None:
    results = {
        "tests on the GPU": {"passed": 20, "skipped": 2, "failures": {"a": "b"}},
        "DRAM bytes small-28": {"over_ideal": 1.2},
        "DRAM bytes small-56": {"over_ideal": 1.4},
        "memory small-14": {
            "eager_nhwc": {"kept": 50, "peak": 100},
            "fused": {"kept": 10, "peak": 40},
        },
        "memory base-7": {
            "eager_nhwc": {"kept": 50, "peak": 100},
            "fused": {"kept": 20, "peak": 30},
        },
        "host time": {"fused": {"inference": 33.0}, "empty_function": 4.0},
        "first call": {
            state: {"import": 0.5, "first forward": 1.5, "first backward": 3.0}
            for state in ("cold", "warm")
        },
        "network": {"training": {"speedup": 1.35}, "logits_difference": 0.01},
    }
    judged = verdicts([], results.get)
    expected = {
        "tests on": (1, False),
        "DRAM bytes over x + weights + y, small-28": (1.2, True),
        "DRAM bytes over x + weights + y, small-56": (1.4, False),
        "memory kept": (0.4, False),  # base-7 is worse than small-14
        "peak memory": (0.4, True),
        "host time": (29.0, True),
        "first forward of a process, warm": (1.5, False),
        "first forward of a process, cold": (1.5, True),
        "training step of SparseMLP, fused over plain, eager": (1.35, True),
        "training step of SparseMLP, fused over plain, both": (None, None),
    }
    for start, (value, passed) in expected.items():
        one = _named(judged, start)
        assert (one.value, one.passed) == (value, passed), start


def test_no_test_that_ran_is_no_pass() -> None:
    results = {"tests on the GPU": {"passed": 0, "skipped": 22, "failures": {}}}
    assert _named(verdicts([], results.get), "tests on").passed is None


def test_table() -> None:
    judged = [Target("speed", 1.5, 1.2, "slow"), Target("size", 0.5, None, at_most=True)]
    _, _, speed, size = table(judged)
    assert [cell.strip() for cell in speed.split("|")[1:-1]] == [
        *("speed", ">= 1.50x", "1.20x", "MISS", "slow")
    ]
    assert [cell.strip() for cell in size.split("|")[1:-1]] == [
        *("size", "<= 0.50x", "-", "-", "not measured")
    ]
