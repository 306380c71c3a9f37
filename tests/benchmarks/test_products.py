"""The products that the report times are those of the block."""

import torch

from benchmarks.products import calls_of
from benchmarks.shapes import Shape


def test_products_of_a_chunk() -> None:
    calls = calls_of(Shape("small", 2, 6, 5, 4), "cpu")
    y = calls["y"]()
    assert y.shape == (2 * 5 * 4, 6) and bool(torch.isfinite(y).all())
    assert calls["G"]().shape == (2 * 5 * 4, 3 * 6)
    assert calls["dF"]() is None
