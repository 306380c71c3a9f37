"""The product against torch's, with edges that no tile divides."""

import pytest
import torch

from benchmarks.gemm_alone import product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_product_with_ragged_edges() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(37, 21, device=DEVICE), torch.randn(19, 21, device=DEVICE)
    y = product(x, w, (16, 16, 16), num_warps=4, num_stages=2)
    torch.testing.assert_close(y, x @ w.t(), atol=2e-2, rtol=1e-2)  # a GPU multiplies in tf32


def test_bad_weights_are_named() -> None:
    x = torch.randn(4, 6)
    for w in (torch.randn(3, 5), torch.randn(6, 3).t()):
        with pytest.raises(ValueError, match=r"w: expected contiguous \[N, 6\]"):
            product(x, w, (16, 16, 16), num_warps=4, num_stages=2)
