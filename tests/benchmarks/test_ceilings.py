"""The arithmetic switch is put back, and nothing is measured where there is no GPU."""

import pytest
import torch

from benchmarks.ceilings import describe, matmul_precision, measure_ceilings
from benchmarks.roofline import Ceilings


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


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="ceilings: an NVIDIA GPU is needed"):
        measure_ceilings()


def test_one_line() -> None:
    line = describe(Ceilings(4.31e12, {"bf16": 7.9e14, "fp32": 5e13}, "H"))
    assert line.endswith("on H: copy 4.31 TB/s, products bf16 790 TFLOP/s, fp32 50 TFLOP/s")
