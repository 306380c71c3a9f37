"""The clocks' bookkeeping; no test here asserts how long anything takes."""

import math

import pytest
import torch

from benchmarks.timing import host_us, interleaved, saved_bytes, wall_stopwatch
from smlp import SMLPBlock


def test_samples_are_taken_in_turn_and_the_median_survives_an_outlier() -> None:
    order: list[str] = []
    readings = {"a": iter([10.0, 11.0, 900.0]), "b": iter([5.0, 5.0, 4.0])}

    def stopwatch(name: str):
        def sample() -> float:
            order.append(name)
            return next(readings[name])

        return sample

    medians = interleaved({name: stopwatch(name) for name in readings}, rounds=3)
    assert order == ["a", "b"] * 3
    assert medians == {"a": 11.0, "b": 5.0}


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        interleaved({}, rounds=0)


def test_saved_bytes_of_the_reference_by_hand() -> None:
    # fp32 [2, 6, 5, 7] is 1,680 bytes: x for proj_w, its permuted copy for proj_h, and the
    # concatenation of three for the 1x1 convolution
    block, x = SMLPBlock(5, 7, 6), torch.randn(2, 6, 5, 7)
    assert saved_bytes(lambda: block(x), list(block.parameters())) == 5 * 1680


def test_saved_bytes_counts_a_shared_storage_once_and_parameters_never() -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(3, 3)
    assert saved_bytes(lambda: (x @ weight) + (x @ weight), [weight]) == 9 * 4


def test_clocks_return_finite_microseconds() -> None:
    assert math.isfinite(wall_stopwatch(lambda: None)())
    assert math.isfinite(host_us(lambda: None, count=2, rounds=2))
