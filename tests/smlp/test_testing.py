"""Equal to rounding: bounds by hand, and what must not pass for it."""

import math

import pytest
import torch

from smlp import SMLPBlock, testing
from smlp.testing import (
    PRECISIONS,
    assert_close,
    compare,
    formula,
    reduction,
    relative_error,
)

ONES = torch.ones(4, dtype=torch.float64)


def test_relative_error_by_hand() -> None:
    actual, exact = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]).double()
    assert relative_error(actual, exact) == pytest.approx(4 / 3)
    assert math.isnan(relative_error(actual * torch.nan, exact))
    assert relative_error(torch.zeros(2), torch.zeros(2).double()) == 0


def off_by(error: float, *, places: int = 4) -> torch.Tensor:
    actual = ONES.clone()
    actual[:places] += error
    return actual


@pytest.mark.parametrize(
    ("peer_error", "places", "bound"),
    [
        (0.0, 4, 1e-3),  # one rounding, by the root mean square
        (0.0, 1, 2e-3),  # that of a single value is half as large
        (1e-2, 4, 1.25e-2 + 1e-3),
        (1e-2, 1, 2e-2 + 8e-3),  # the largest: twice PyTorch's and eight roundings
    ],
)
def test_bounds(peer_error: float, places: int, bound: float) -> None:
    peer = off_by(peer_error)
    if places == 1 and peer_error:  # so that the root mean square does not decide
        bound = min(bound, 2 * (1.25 * peer_error + 1e-3))
    below, above = (off_by(bound * factor, places=places) for factor in (0.99, 1.01))
    assert compare(below, ONES, peer, eps=1e-3).problem is None
    assert "largest error" in (compare(above, ONES, peer, eps=1e-3).problem or "")
    with pytest.raises(AssertionError, match=r"y: largest error .* rms"):
        assert_close(above, ONES, peer, eps=1e-3, name="y")


def test_longer_sums_and_cancelled_terms_are_allowed_more() -> None:
    actual = off_by(3e-7)
    assert compare(actual, ONES, None, eps=2.0**-24).problem
    assert compare(actual, ONES, None, eps=2.0**-24, reduction=26).problem is None
    assert compare(actual, ONES, None, eps=2.0**-24, terms=6 * ONES).problem is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_equal(bad: float) -> None:
    actual, peer = off_by(bad, places=1), off_by(torch.inf)
    assert compare(actual, ONES, peer, eps=1e-3).problem == "1 values not finite"
    assert compare(actual, ONES, peer, eps=1e-3).peer_error == math.inf


def test_a_peer_that_is_not_finite_allows_nothing_of_it() -> None:
    assert compare(ONES, ONES, off_by(torch.nan), eps=1e-3).problem


def test_shapes_are_named_and_empty_results_are_equal() -> None:
    assert compare(ONES[:2], ONES, None, eps=1).problem == "shape [2], expected [4]"
    assert compare(ONES[:0], ONES[:0], None, eps=1).problem is None


@pytest.mark.parametrize("bias", [True, False])
def test_the_formula_is_the_block(bias: bool) -> None:
    x, weights = testing.random_arguments(2, 3, 5, 4, torch.float64, bias=bias)
    by_hand = torch.empty_like(x)
    weight_h, bias_h, weight_w, bias_w, fuse, bias_fuse = weights
    zeros = [torch.zeros(size).double() for size in (3, 5, 4)]
    bias_h, bias_w, bias_fuse = (bias_h, bias_w, bias_fuse) if bias else zeros
    for b in range(2):
        for h in range(3):
            for w in range(5):
                x_h = x[b, :, :, w] @ weight_h[h] + bias_h[h]
                x_w = x[b, :, h] @ weight_w[w] + bias_w[w]
                branches = torch.cat([x_h, x_w, x[b, :, h, w]])
                by_hand[b, :, h, w] = fuse.flatten(1) @ branches + bias_fuse
    assert_close(formula(x, *weights), by_hand, None, eps=PRECISIONS["fp64"].eps)
    bias_map = torch.arange(60.0).double().view(4, 3, 5)
    difference = formula(x, *weights[:5], bias_map) - formula(x, *weights[:5], None)
    torch.testing.assert_close(difference, bias_map.expand(2, 4, 3, 5))


def test_terms_of_sums_by_either_name() -> None:
    sizes = (2, 3, 5, 4)
    assert reduction("output", *sizes) == 1
    assert reduction("x", *sizes) == 3
    for old, new, terms in (("_h", "proj_h", 40), ("_w", "proj_w", 24), ("_fuse", "fuse", 30)):
        for part in ("weight", "bias"):
            assert reduction(part + old, *sizes) == reduction(f"{new}.{part}", *sizes) == terms
    named = [name for name, _ in SMLPBlock(3, 5, 4).named_parameters()]
    assert {name.partition(".")[0] for name in named} == {"proj_h", "proj_w", "fuse"}
