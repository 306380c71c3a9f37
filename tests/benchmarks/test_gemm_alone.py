"""The product against torch's, with edges that no tile divides; and compiled for GPUs."""

import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gemm_alone
from benchmarks.gemm_alone import SHAPES, Tile, product, tile_of
from benchmarks.recorder import Context
from benchmarks.roofline import Ceilings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("columns", [16, 48])  # one power of two, and two
def test_product_with_ragged_edges(columns: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(37, 21, device=DEVICE), torch.randn(83, 21, device=DEVICE)
    y = product(x, w, Tile(16, columns, 16, num_warps=4, num_stages=2))
    torch.testing.assert_close(y, x @ w.t(), atol=2e-2, rtol=1e-2)  # a GPU multiplies in tf32


COMPILE = """
from benchmarks.gemm_alone import SHAPES, launch, operands, product_kernel, tile_of
from tests.rehearsal import driver

for arch in (80, 90):
    driver.use(arch)
    for shape in SHAPES:
        x, w = operands(shape, "meta")
        programs, arguments, options = launch(x, w, x.new_empty(x.shape[0], w.shape[0]),
                                              tile_of(shape, arch))
        binary = product_kernel.warmup(*arguments, grid=(programs,), **options)
        print(arch, shape.name, binary.metadata.shared <= driver.SHARED_MEMORY[arch])
"""


def test_compiles_for_gpus_and_fits_them() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    expected = [f"{arch} {shape.name} True" for arch in (80, 90) for shape in SHAPES]
    assert child.stdout.splitlines() == expected
    # one of them is no power of two, which is what an arange does not take
    assert any(tile_of(shape, 90).columns & (tile_of(shape, 90).columns - 1) for shape in SHAPES)


def test_a_wrong_product_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(4, 6), torch.randn(3, 6)
    monkeypatch.setattr(gemm_alone, "SHAPES", SHAPES[:1])
    monkeypatch.setattr(gemm_alone, "operands", lambda *_: (x, w))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gemm_alone.timing, "event_us", lambda call: 1.0)
    context = Context(time.monotonic() + 60, Ceilings(1e12, {"bf16": 1e15}, "invented"))
    for scale, failures in ((1.0, set()), (1.1, {SHAPES[0].name}), (torch.nan, {SHAPES[0].name})):
        monkeypatch.setattr(gemm_alone, "product", lambda x, w, tile, s=scale: s * (x @ w.t()))
        assert gemm_alone.gemm_alone(context)["failures"].keys() == failures


def test_bad_weights_are_named() -> None:
    x = torch.randn(4, 6)
    for w in (torch.randn(3, 5), torch.randn(6, 3).t()):
        with pytest.raises(ValueError, match=r"w: expected contiguous \[N, 6\]"):
            product(x, w, Tile(16, 16, 16, num_warps=4, num_stages=2))
