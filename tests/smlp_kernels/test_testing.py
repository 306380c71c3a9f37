"""``check_block``: right kernels pass, and whatever is wrong with a result is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import smlp_kernels
from smlp.testing import NAMES
from smlp_kernels import check_block, fused_smlp, testing
from tests.smlp_kernels.oracle import DEVICE

RESULTS = ["output", *(f"gradient of {name}" for name in NAMES)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_right_kernels(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    report = check_block(7, 5, 20, dtype=dtype, device=DEVICE, memory_format=memory_format)
    assert report.is_right and [result.name for result in report.results] == RESULTS
    first, *lines = str(report).splitlines()
    assert first.startswith("block 7x5, 20 channels, batch 2, " + str(dtype)[6:])
    assert sum(line.endswith("equal to rounding") for line in lines) == len(RESULTS)


def test_without_biases_in_inference_mode_and_under_autocast() -> None:
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        report = check_block(4, 6, 3, batch=1, bias=False, device=DEVICE)
    names = [result.name for result in report.results]
    assert names == [name for name in RESULTS if "bias" not in name]


class _AddToGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (1 + ctx.share), None


WRONG: dict[str, Callable[..., Tensor]] = {
    "output": lambda *given: fused_smlp(*given) + 1e-4,
    "gradient of x": lambda x, *given: fused_smlp(_AddToGradient.apply(x, 1e-5), *given),
    "gradient of weight_w": lambda x, h, bias_h, w, *given: fused_smlp(
        x, h, bias_h, _AddToGradient.apply(w, 1e-4), *given
    ),
    "gradient of bias_fuse": lambda *given: fused_smlp(
        *given[:6], _AddToGradient.apply(given[6], torch.nan)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "fused_smlp", WRONG[name])
    with pytest.raises(AssertionError, match="the kernels are wrong here") as caught:
        check_block(7, 5, 20, device=DEVICE)
    lines = [line for line in str(caught.value).splitlines() if line.startswith(tuple(RESULTS))]
    wrong = [line for line in lines if not line.endswith("equal to rounding")]
    assert len(lines) == len(RESULTS) and len(wrong) == 1 and wrong[0].startswith(name)


def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("height", "width", "channels", "batch"):
        sizes = {"height": 2, "width": 2, "channels": 2, name: 0}
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            check_block(**sizes, device=DEVICE)
    with pytest.raises(TypeError, match="height: expected an integer"):
        check_block(2.5, 2, 2, device=DEVICE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: 'cuda:99' cannot be used"):
        check_block(2, 2, 2, device="cuda:99")
    with pytest.raises(ValueError, match="runs on the kernels, but there are 2049 channels"):
        check_block(1, 1, 2049, device=DEVICE)
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")
    with pytest.raises(ValueError, match="runs on the kernels, but SMLP_KERNELS_DISABLE=1 is set"):
        check_block(2, 2, 2, device=DEVICE)


def test_it_is_public() -> None:
    assert "check_block" in smlp_kernels.__all__
    assert all(hasattr(testing, name) for name in testing.__all__)
