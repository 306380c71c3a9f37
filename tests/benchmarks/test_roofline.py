"""Floor arithmetic against a table worked out by hand.

Rates of the table: 3.0 TB/s copy, 798 TFLOP/s bf16; batch 128. Example, 56x56 C=80: x is
128 * 80 * 3136 * 2 bytes = 64 MB, read and written in 43 us; 128 * 3136 * 80 * (112 + 240)
multiply-adds are 23 GFLOP, 28 us.
"""

import pytest
import torch

from benchmarks.roofline import (
    Ceilings,
    floor_us,
    flops,
    io_bytes,
    matmul_precision,
    weight_elements,
)
from benchmarks.shapes import BY_NAME, Shape

H100 = Ceilings(3.0e12, {"bf16": 798e12}, "by hand")

# name: x in MB, GFLOP, memory us, matrix us, floor forward, floor backward
BY_HAND = {
    "tiny-56": (64, 23, 43, 28, 43, 64),
    "small-56": (77, 31, 51, 39, 51, 77),
    "base-56": (90, 40, 60, 51, 60, 101),
    "tiny-28": (32, 17, 21, 22, 22, 43),
    "small-28": (39, 24, 26, 31, 31, 61),
    "base-28": (45, 33, 30, 41, 41, 82),
    "tiny-14": (16, 16, 11, 20, 20, 40),
    "small-14": (19, 23, 13, 28, 28, 57),
    "base-14": (22, 31, 15, 39, 39, 77),
    "tiny-7": (8, 16, 6, 20, 20, 39),
    "small-7": (10, 22, 8, 28, 28, 56),
    "base-7": (11, 30, 9, 38, 38, 76),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_floor_table(name: str) -> None:
    megabytes, gflop, memory_us, matrix_us, forward_us, backward_us = BY_HAND[name]
    shape = BY_NAME[name]
    assert shape.elements * 2 / 1e6 == pytest.approx(megabytes, abs=0.7)
    assert flops(shape, "fwd") / 1e9 == pytest.approx(gflop, abs=0.7)
    assert 1e6 * io_bytes(shape, "fwd", "bf16") / 3.0e12 == pytest.approx(memory_us, abs=0.7)
    assert 1e6 * flops(shape, "fwd") / 798e12 == pytest.approx(matrix_us, abs=0.7)
    assert floor_us(shape, "fwd", "bf16", H100) == pytest.approx(forward_us, abs=0.7)
    assert floor_us(shape, "bwd", "bf16", H100) == pytest.approx(backward_us, abs=0.7)


def test_one_pixel_by_hand() -> None:
    # B=C=H=W=1: x_h, x_w one multiply-add each, fuse three; weights 1+1, 1+1, 3+1 with biases
    shape = Shape("one", 1, 1, 1, 1)
    assert flops(shape, "fwd") == 2 * 5
    assert flops(shape, "bwd") == 4 * 5
    assert weight_elements(shape) == 8
    assert io_bytes(shape, "fwd", "fp32") == 4 * (1 + 1 + 8)
    assert io_bytes(shape, "bwd", "bf16") == 2 * (3 + 2 * 8)


def test_axes_are_not_exchanged_with_channels() -> None:
    shape = Shape("oblong", 2, 5, 3, 7)
    assert flops(shape, "fwd") == 2 * (2 * 5 * 3 * 7) * (3 + 7 + 15)
    assert weight_elements(shape) == 9 + 3 + 49 + 7 + 75 + 5


def test_forward_and_backward_add_up_and_inference_is_a_forward() -> None:
    shape = BY_NAME["base-56"]  # memory-bound forward, matrix-bound backward
    parts = [floor_us(shape, part, "bf16", H100) for part in ("fwd", "bwd")]
    assert floor_us(shape, "fwd+bwd", "bf16", H100) == pytest.approx(sum(parts))
    assert floor_us(shape, "inference", "bf16", H100) == parts[0]


@pytest.mark.parametrize(
    ("dtype", "precision", "tf32"), [("tf32", "high", True), ("fp32", "highest", False)]
)
def test_precision_is_set_and_put_back(dtype: str, precision: str, tf32: bool) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), matmul_precision(dtype):
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is tf32
        raise KeyError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of bf16"), matmul_precision("int8"):
        pass


def test_one_line() -> None:
    line = str(Ceilings(4.31e12, {"bf16": 7.9e14, "fp32": 5e13}, "H"))
    assert line.endswith("on H: copy 4.31 TB/s, products bf16 790 TFLOP/s, fp32 50 TFLOP/s")
