"""The clocks' bookkeeping; no test here asserts how long anything takes."""

import math

import pytest

from benchmarks.timing import host_us, interleaved, wall_stopwatch


def test_samples_are_taken_in_turn_and_the_median_survives_an_outlier() -> None:
    order: list[str] = []
    readings = {"a": iter([10.0, 11.0, 900.0]), "b": iter([5.0, 5.0, 4.0])}

    def stopwatch(name: str):
        def sample() -> float:
            order.append(name)
            return next(readings[name])

        return sample

    found = interleaved({name: stopwatch(name) for name in readings}, rounds=3)
    assert order == ["a", "b"] * 3
    assert {name: samples.median for name, samples in found.items()} == {"a": 11.0, "b": 5.0}
    assert found["a"].spread == pytest.approx(89) and found["b"].spread == pytest.approx(0.25)


def test_clocks_return_finite_microseconds() -> None:
    assert math.isfinite(wall_stopwatch(lambda: None)())
    assert math.isfinite(host_us(lambda: None, count=2, rounds=2))
