"""The functional form: bad input, and what runs where."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from smlp.testing import EPS, NAMES, assert_close, formula, to_float64
from smlp_kernels import fallback_reason, functional, fused_smlp
from tests.smlp_kernels.oracle import DEVICE, Case


def arguments(**changes: object) -> list:
    values = dict(zip(NAMES, Case(2, 5, 6, 4).arguments(torch.float32), strict=True))
    return list({**values, **changes}.values())


BAD = {
    "x is no tensor": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "x has three axes": (
        {"x": torch.zeros(4, 5, 6)},
        ValueError,
        r"x: expected shape \[B, C, H, W\], none of C, H, W 0, got \[4, 5, 6\]",
    ),
    "no channels": ({"x": torch.zeros(2, 0, 5, 6)}, ValueError, "none of C, H, W 0"),
    "weight_h": (
        {"weight_h": torch.zeros(6, 6)},
        ValueError,
        r"weight_h: expected shape \[5, 5\] for x of shape \[2, 4, 5, 6\], got \[6, 6\]",
    ),
    "weight_w": (
        {"weight_w": torch.zeros(6)},
        ValueError,
        r"weight_w: expected shape \[6, 6\].*got \[6\]",
    ),
    "weight_fuse": (
        {"weight_fuse": torch.zeros(12, 4)},
        ValueError,
        r"weight_fuse: expected shape \[4, 12\] or \[4, 12, 1, 1\].*got \[12, 4\]",
    ),
    "bias_h": ({"bias_h": torch.zeros(6)}, ValueError, r"bias_h: expected shape \[5\].*got \[6\]"),
    "bias_fuse is no tensor": (
        {"bias_fuse": 0.0},
        TypeError,
        "bias_fuse: expected a tensor, got float",
    ),
    "dtype": (
        {"bias_w": torch.zeros(6, dtype=torch.float64)},
        TypeError,
        "bias_w: expected the type of x, torch.float32, got torch.float64",
    ),
    "sparse": (
        {"weight_w": torch.eye(6).to_sparse()},
        TypeError,
        "weight_w: expected a dense tensor, got one of layout torch.sparse_coo",
    ),
    "integers": ({"x": torch.zeros(2, 4, 5, 6, dtype=torch.int32)}, TypeError, "floating-point"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changes, error, message = BAD[name]
    changes = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(error, match=message):
        fused_smlp(*arguments(**changes))


def test_another_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight_h: expected the device of x.*got meta"):
        fused_smlp(*arguments(weight_h=torch.zeros(5, 5, device="meta")))


def test_fuse_as_a_matrix() -> None:
    values = Case(2, 5, 6, 4).arguments(torch.float64)
    exact = formula(*values)
    values[5] = values[5].flatten(1)
    assert_close(fused_smlp(*values), exact, None, eps=EPS[torch.float64])


FALLBACKS = {
    "height": (torch.zeros(1, 1, 257, 1), "height and width are 257 and 1; the kernels go to 256"),
    "channels": (torch.zeros(1, 2049, 1, 1), "2049 channels; the kernels go to 2048"),
    "type": (torch.zeros(1, 1, 1, 1, dtype=torch.float8_e5m2), "the type is torch.float8_e5m2"),
    "device": (torch.zeros(1, 1, 1, 1, device="meta"), "the device is meta"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallback_says_why(name: str) -> None:
    x, reason = FALLBACKS[name]
    assert reason in (fallback_reason(x if x.is_meta else x.to(DEVICE)) or "")


def test_fallback_of_what_is_no_batch_of_images() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, C, H, W\], got \[3, 4, 5\]"):
        fallback_reason(torch.zeros(3, 4, 5))


def test_sizes_at_the_limit_run_on_kernels() -> None:
    for shape in ((1, 1, 256, 256), (1, 2048, 1, 1)):
        assert fallback_reason(torch.zeros(shape, device=DEVICE)) is None


def test_disable_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 1, 1, device=DEVICE)
    assert fallback_reason(x) is None
    monkeypatch.setenv("SMLP_KERNELS_DISABLE", "1")
    assert fallback_reason(x) == "SMLP_KERNELS_DISABLE=1 is set"


@pytest.mark.skipif(DEVICE == "cuda", reason="about the CPU without the interpreter")
def test_fallback_computes_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "INTERPRETED", False)
    monkeypatch.setattr(functional.ops, "differentiable_mix", None)  # would fail if it were called
    values = Case(2, 5, 6, 4).arguments(torch.float64)
    assert "the device is cpu" in (fallback_reason(values[0]) or "")
    exact = formula(*values)
    assert_close(fused_smlp(*values), exact, None, eps=EPS[torch.float64])
    values[5] = values[5].flatten(1)
    assert_close(fused_smlp(*values), exact, None, eps=EPS[torch.float64])


def test_large_sizes_fall_back_to_the_same_values() -> None:
    values = Case(1, 257, 2, 2).arguments(torch.float64)
    exact = formula(*to_float64(values))
    assert_close(fused_smlp(*values), exact, None, eps=EPS[torch.float64])


class Quantized(torch.Tensor):
    """As weights of quantization libraries: integers and a scale, with rules for ATen's operators.

    Its values are rounded to halves.
    """

    @staticmethod
    def __new__(cls, halves: Tensor, dtype: torch.dtype) -> "Quantized":
        return torch.Tensor._make_wrapper_subclass(
            cls, halves.shape, dtype=dtype, device=halves.device
        )

    def __init__(self, halves: Tensor, dtype: torch.dtype) -> None:
        self.halves = halves

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["halves"], self.dtype

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"no rule for {func}")

        def dense(value: object) -> object:
            return value.halves.to(value.dtype) / 2 if isinstance(value, cls) else value

        return func(*map(dense, args), **(kwargs or {}))


@pytest.mark.parametrize("index", [1, 3, 5])
def test_weights_with_operators_of_their_own_run_on_pytorch(index: int) -> None:
    values = Case(2, 5, 6, 4).arguments(torch.float64)
    halves = (2 * values[index]).round().to(torch.int8)
    values[index] = halves.double() / 2
    values[0].requires_grad_()
    exact = formula(*values)
    (expected,) = torch.autograd.grad(exact.square().sum(), values[0])
    actual = fused_smlp(*values[:index], Quantized(halves, torch.float64), *values[index + 1 :])
    assert_close(actual, exact, None, eps=EPS[torch.float64])
    (actual,) = torch.autograd.grad(actual.square().sum(), values[0])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs a torch with gloo"
)
def test_tensors_of_several_processes_run_on_pytorch() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    values = [v.requires_grad_() for v in Case(2, 5, 6, 4).arguments(torch.float64)]
    exact = formula(*values)
    expected = torch.autograd.grad(exact.square().sum(), values)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        leaves = [
            distribute_tensor(value.detach(), mesh, [Replicate() if index else Shard(0)])
            for index, value in enumerate(values)
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        assert "DTensor" in (fallback_reason(leaves[0]) or "")
        y = fused_smlp(*leaves)
        assert y.placements == (Shard(0),)
        actual = torch.autograd.grad(y.square().sum(), leaves)
        for got, want in zip((y, *actual), (exact, *expected), strict=True):
            torch.testing.assert_close(got.full_tensor(), want, rtol=1e-12, atol=1e-12)
    finally:
        dist.destroy_process_group()
